"""Estimators of the scikit-learn API, for tables and images."""
