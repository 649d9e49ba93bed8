"""Measures the running service: load, cold starts and telemetry overhead."""
