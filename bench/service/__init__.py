"""Measures the running service: load, cold starts, telemetry overhead, and throughput of peers."""
