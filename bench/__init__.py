"""Comparing step latency: runs, comparisons and verdicts."""
