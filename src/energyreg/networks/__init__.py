"""Modules with weights: encoders of x, heads that give f, proposals q(y|x)."""
