"""A tiny SDXL checkpoint, the program that trains it, and the scenes it learns."""
