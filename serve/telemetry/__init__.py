"""Telemetry built from the settings, logs, profiles and the doctor."""
