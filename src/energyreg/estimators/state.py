"""What an estimator's file holds besides the model: data, of which no value is believed before it is checked."""

from __future__ import annotations

import math
import warnings
from typing import Any, TypedDict

import torch

from energyreg.training.history import History

__all__ = ["State", "available", "check_state"]

DEVICES = ("cpu", "cuda", "mps", "xpu")
MOST_THREADS = 1024
"""Devices, and number of threads, that a file may ask for."""
ROUNDING = 1e-3
"""How far a probability may be out of [0, 1] that was rounded."""


class State(TypedDict):
    """What a file holds besides the model."""

    parameters: dict[str, Any]
    preprocessor: dict[str, Any]
    feature_names: list[str] | None
    n_features: int
    n_outputs: int
    n_iter: int
    frequency_scales: list[float | None]
    dropouts: list[float | None]
    lattice_step: float | None
    calibration: list[float]
    conformal: dict[str, list[float]]
    histories: list[History]


def check_state(estimator: Any) -> None:
    """Refuse attributes from a file that contradict each other, or that no fit has."""
    from sklearn.utils import check_random_state

    names = getattr(estimator, "feature_names_in_", None)
    step, circle = estimator.lattice_step_, any(estimator.model_.space.periodic)
    check_random_state(estimator.random_state)
    for name, fine in (
        ("n_features", estimator.n_features_in_ == estimator.preprocessor_.num_columns_),
        ("feature_names", names is None or list(names) == estimator.preprocessor_.names_),
        ("target", list(estimator.target_.space().periodic) == list(estimator.model_.space.periodic)),
        ("n_jobs", abs(estimator.n_jobs or 1) <= MOST_THREADS),
        ("lattice_step", step is None or (0 < step < math.inf and estimator.n_outputs_ == 1 and not circle)),
        ("conformal", not (circle and hasattr(estimator, "conformal_intervals_"))),
    ):
        if not fine:
            raise ValueError(f"{name} contradicts the rest")
    for name in ("conformal_regions_", "conformal_intervals_"):
        scores = getattr(estimator, name).scores[None] if hasattr(estimator, name) else [0.5]
        probabilities = name == "conformal_regions_" or estimator.n_outputs_ == 1
        if len(scores) == 0 or (probabilities and (min(scores) < -ROUNDING or max(scores) > 1 + ROUNDING)):
            raise ValueError(f"{name} has scores that no row can have")


def available(device: torch.device) -> torch.device:
    """The device of a model that was saved; the CPU, with a warning, where this machine lacks it.

    Raises:
        ValueError: If it is no place to calculate.
    """
    if device.type not in DEVICES:
        raise ValueError(f"device is {str(device)!r}; expected one of {', '.join(DEVICES)}")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # PyTorch raises an AssertionError where it was built without CUDA
        warnings.warn(
            f"The model was fitted with device={str(device)!r}, which cannot be used here ({error}); it runs "
            "on the CPU.",
            stacklevel=4,
        )
        return torch.device("cpu")
    return device
