"""A model for other programs, and a page for people."""
