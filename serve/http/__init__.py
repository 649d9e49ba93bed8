"""HTTP: middleware, endpoints, events and errors; in rooms, connections, gateway, OpenAI's API."""
