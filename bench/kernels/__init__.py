"""Where the time of a step goes, by kernel and operator, measured or counted."""
