"""Measure the service and its model, and judge and show the results."""
