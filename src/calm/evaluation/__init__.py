"""How good is a model: BrierLM, reconstruction, and what it costs."""
