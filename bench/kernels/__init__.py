"""Where a step's time goes, by kernel and operator, measured or counted."""
