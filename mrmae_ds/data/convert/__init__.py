"""Conversion of image data sets to .beton files."""
