"""A run: its YAML, its folder, its compiled step, opened again."""
