"""The models: autoencoder, language model, heads, generation."""
