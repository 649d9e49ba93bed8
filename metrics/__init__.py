"""What happened, and its export: clocks, timings, spans and metrics. Imports no other package of
the project."""
