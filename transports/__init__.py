"""Moves opaque frames between two ends; knows no model and no message types."""
