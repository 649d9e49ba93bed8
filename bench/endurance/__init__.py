"""Whether a server holds out: under more load than it can serve, and over thousands of requests."""
