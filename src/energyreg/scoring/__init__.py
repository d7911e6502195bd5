"""Rows of a table to named columns of predictions, in blocks, ready for any engine."""
