"""Requests as they cross the wire: middleware, endpoints, error responses."""
