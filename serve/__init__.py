"""A request, from HTTP to image."""
