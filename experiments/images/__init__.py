"""Regression from images: age, steering, cell counts and head pose."""
