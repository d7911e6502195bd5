"""Data sets as arrays: bundled, or read from files that you name. Nothing is downloaded."""

from energyreg.datasets.protein import Protein, load_protein

__all__ = ["Protein", "load_protein"]
