"""How many replicas a rate of requests needs, what they cost, and how many spans they make."""
