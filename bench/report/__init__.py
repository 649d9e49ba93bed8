"""Results for people: tables, pages, the README."""
