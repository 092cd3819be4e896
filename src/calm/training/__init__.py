"""Training: a YAML recipe in, a self-contained model directory out."""
