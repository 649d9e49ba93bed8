"""What happened, and telling it: clocks, timings, spans and metrics. Imports nothing of ours."""
