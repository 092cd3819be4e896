"""The training loop: trainer, losses of token models, interruption, log."""
