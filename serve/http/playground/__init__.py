"""The playground: the page at `GET /`, its figures, and the timelines of the last requests."""
