"""Preferences from scores: what `diffalign label` does."""
