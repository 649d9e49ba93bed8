"""OpenAI's images API over the same runtime: its requests, its responses, its errors."""
