"""Measures on y: target spaces, base measures, mixtures, noise around a target. No network."""
