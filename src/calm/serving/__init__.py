"""An HTTP server with continuous batching."""
