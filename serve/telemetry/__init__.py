"""Telemetry built from the settings, log lines, profiles of single runs, and the doctor."""
