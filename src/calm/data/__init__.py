"""Text to token blocks: corpora, tokenizer, preparation. Imports nothing else of this package."""
