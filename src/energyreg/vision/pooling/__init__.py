"""Exact, differentiable pooling of boxes from feature maps."""
