"""Plots and image grids."""
