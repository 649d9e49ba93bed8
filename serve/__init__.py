"""A request, from HTTP to image."""

# The only place that names the version. A checkout that is not installed has no package metadata,
# so pyproject.toml reads the version from here.
__version__ = "0.1.0"
