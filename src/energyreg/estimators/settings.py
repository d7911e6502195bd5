"""The parameters of an estimator by which models are trained: checked together, and handed on as one object."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch

from energyreg.checks import check_count, is_number, is_whole

__all__ = ["Settings", "find_device", "threads"]

LOGGER = logging.getLogger("energyreg")
BASES = ("auto", "marginal", "proposal")
OUTPUTS = ("auto", "joint", "chain")
SPLITS = ("auto", "random", "time")


@dataclass(frozen=True)
class Settings:
    """Parameters of an estimator, as :class:`~energyreg.estimators.table.EnergyRegressor` describes them."""

    n_members: Any
    epochs: Any
    batch_size: int | None
    learning_rate: float
    width: Any
    depth: int
    dropout: float | None
    frequency_scale: Any
    base: str
    outputs: str
    num_components: int
    validation_fraction: float | None
    split: str
    time_budget: float | None
    calibrate: bool
    conformal: bool
    max_levels: int
    min_count: int
    n_jobs: int | None
    device: Any
    verbose: bool

    @classmethod
    def of(cls, estimator: Any, **fixed: Any) -> Self:
        """The parameters of an estimator.

        Args:
            estimator: It has them as attributes.
            **fixed: Those that it does not have.

        Raises:
            ValueError: If one cannot be used; the message says which, and what to pass.
        """
        names = {field.name for field in fields(cls)} - set(fixed)
        settings = cls(**{name: getattr(estimator, name) for name in names}, **fixed)
        settings._check()
        return settings

    def _check(self) -> None:
        for name in ("epochs", "n_members", "width"):
            if getattr(self, name) != "auto":
                check_count(name, getattr(self, name), also=' or "auto"')
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size, also=" or None")
        for name in ("depth", "num_components", "max_levels", "min_count"):
            check_count(name, getattr(self, name))
        if self.n_jobs is not None and (not is_whole(self.n_jobs) or self.n_jobs == 0):
            raise ValueError(f"n_jobs is {self.n_jobs!r}; expected a whole number, -1 for all cores, or None.")
        for name, least, below, none in (
            ("learning_rate", 0.0, math.inf, False), ("dropout", -1.0, 1.0, True), ("time_budget", 0.0, math.inf, True),
            ("validation_fraction", -1.0, 1.0, True),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and none:
                continue
            fine = is_number(value) and least < value < below
            if not fine or (least < 0 and value < 0):
                span = "> 0" if least == 0 else "from 0 to below 1"
                raise ValueError(f"{name} is {value!r}; expected a number {span}{' or None' if none else ''}.")
        scale = self.frequency_scale
        if not (is_number(scale) and 0 < scale < math.inf) and not (isinstance(scale, str) and scale == "auto"):
            raise ValueError(f'frequency_scale is {scale!r}; expected a number > 0 or "auto".')
        for name, known in (("base", BASES), ("outputs", OUTPUTS), ("split", SPLITS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(repr, known))}.")
        if self.device not in (None, "auto") and not isinstance(self.device, (str, torch.device)):
            raise ValueError(f"device is {self.device!r}; expected 'cpu', 'cuda', 'auto' or None.")
        for name in ("calibrate", "conformal"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False.")

    def log(self, text: str) -> None:
        """Write to the log, and with `verbose` to stdout."""
        LOGGER.info(text)
        if self.verbose:
            print(text)


@contextlib.contextmanager
def threads(n_jobs: int | None) -> Iterator[None]:
    """Give torch so many threads for a while: -1 for all cores, None for as many as it has."""
    if n_jobs is None:
        yield
        return
    before = torch.get_num_threads()
    cores = os.cpu_count() or 1
    torch.set_num_threads(n_jobs if n_jobs > 0 else max(cores + 1 + n_jobs, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_device(device: Any) -> torch.device:
    """The device that the parameter of an estimator stands for."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cpu" if device is None else device)
