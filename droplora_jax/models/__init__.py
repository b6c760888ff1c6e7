"""One decoder for all families of models; a file for each family in `families/`."""
