"""OpenAI's images API over the same runtime: its requests and responses."""
