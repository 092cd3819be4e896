"""Device, files, paths, progress."""
