"""Results for people: tables, plots, reports."""
