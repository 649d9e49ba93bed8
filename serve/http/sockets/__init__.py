"""Connections: what a client may take of a server before the app and while it is answered."""
