"""Show results: tables in a terminal, HTML pages, the tables of the README."""
