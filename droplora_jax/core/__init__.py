"""What everything stands on: errors, files, processes, keys, meshes."""
