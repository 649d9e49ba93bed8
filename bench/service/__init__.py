"""The service under load and at start: rates, cold starts, overhead, peers."""
