"""What all other rooms use: errors, files, processes, random keys, meshes."""
