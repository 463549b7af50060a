"""The OpenAI-compatible HTTP server: a client of the router that speaks HTTP to its own clients."""
