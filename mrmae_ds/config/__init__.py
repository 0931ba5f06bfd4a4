"""Recipes and engine configs: strict, typed, parsed once."""
