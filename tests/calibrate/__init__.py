"""Statistics gathered from data."""
