"""Figures: densities of chosen rows, calibration, learning curves, and whether log Z can be trusted.

Every function returns a Matplotlib `Figure` and draws into an `Axes` of yours where it takes one; it raises
`ImportError` where Matplotlib is not installed. None touches the global backend or pyplot, so they work in scripts,
servers and notebooks alike. Neutral colours follow your `rcParams`; models get the colours of `COLORS` in the order of
the mapping, so the same mapping order gives a model the same colour in every figure. These colours (Okabe and Ito's)
can be told apart with any common colour vision and stand out from white as from near-black.
"""

from energyreg.plots.calibration import coverage_curve, pit_histogram, reliability_curve, sharpness
from energyreg.plots.diagnostics import learning_curves, log_partition
from energyreg.plots.distributions import densities, histogram, joint_draws, probabilities
from energyreg.plots.style import COLORS

__all__ = [
    "COLORS",
    "coverage_curve",
    "densities",
    "histogram",
    "joint_draws",
    "learning_curves",
    "log_partition",
    "pit_histogram",
    "probabilities",
    "reliability_curve",
    "sharpness",
]
