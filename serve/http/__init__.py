"""HTTP: middleware, endpoints, server-sent events, error responses, and the gateway's client."""
