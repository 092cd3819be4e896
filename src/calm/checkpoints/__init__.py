"""Checkpoints: loading and saving models, the layout of the reference implementation both ways."""
