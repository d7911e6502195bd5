"""Made tables: a case says in a few words what a table is like, so that a failing one can be read, shrunk and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
from hypothesis import strategies as st

COLUMNS = (
    "normal", "wide", "integer", "large integer", "nullable", "boolean", "constant", "missing", "all missing", "wild",
    "float32", "category", "levels", "many levels", "text and numbers", "date", "bad cell",
)  # fmt: skip
NUMERIC = COLUMNS[:4] + COLUMNS[5:11]
SHAPES = (
    "smooth",
    "wild",
    "constant",
    "two values",
    "few values",
    "rounded",
    "point mass",
    "heavy",
    "sharp",
    "bimodal",
)
TARGETS = ("real", "positive", "interval", "circle", "count", "several")
EXPONENTS = (0, 0, 0, 3, -3, 6, -6, 12, -12)
OFFSETS = (0, 0, 0, 1, -30, 1e4, -1e6)
"""Of the targets, in multiples of their scale."""


@dataclass(frozen=True)
class Case:
    """A table, its targets, and the settings of a fit; everything random in it follows from `seed`."""

    target: str = "real"
    rows: int = 50
    columns: tuple[str, ...] = ("normal",)
    shape: str = "smooth"
    exponent: int = 0
    offset: float = 0
    repeated: bool = False
    at_ends: bool = False
    container: str = "pandas"
    n_members: int = 1
    base: str = "auto"
    outputs: str = "auto"
    conformal: bool = False
    weighted: bool = False
    report: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        """Unit of the targets."""
        return 10.0**self.exponent

    def kinds(self) -> list[Any]:
        """What `target` is for each output."""
        low = self.offset * self.scale
        kinds = {
            "real": "real", "positive": "positive", "count": "count",
            "interval": ("interval", low, low + self.scale), "circle": ("circle", low, low + self.scale),
        }  # fmt: skip
        if self.target != "several":
            return [kinds[self.target]]
        names = ("real", "positive", "interval", "circle")
        return [kinds[names[(self.seed + place) % 4]] for place in range(2 + self.seed % 2)]


def cases(target: str) -> st.SearchStrategy[Case]:
    """Cases with this kind of target."""
    return st.builds(
        Case,
        target=st.just(target),
        rows=st.one_of(st.integers(2, 12), st.integers(30, 70)),
        columns=st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=3).map(tuple),
        shape=st.sampled_from(SHAPES),
        exponent=st.sampled_from(EXPONENTS),
        offset=st.sampled_from(OFFSETS),
        repeated=st.booleans(),
        at_ends=st.booleans(),
        container=st.sampled_from(("pandas", "polars", "numpy")),
        n_members=st.sampled_from((1, 1, 2)),
        base=st.sampled_from(("auto", "marginal", "proposal")),
        outputs=st.sampled_from(("auto", "joint", "chain")) if target == "several" else st.just("auto"),
        conformal=st.integers(0, 9).map(lambda number: number == 0),
        weighted=st.integers(0, 9).map(lambda number: number == 0),
        report=st.just(False),
        seed=st.integers(0, 2**16),
    )


def make(case: Case) -> tuple[Any, np.ndarray, Any]:
    """The table of a case, its targets, (N, D), and rows like no other to predict."""
    rng = np.random.default_rng(case.seed)
    signal = rng.normal(size=case.rows)
    columns, others = {}, {}
    for place, kind in enumerate(case.columns):
        if case.container == "numpy" and kind not in NUMERIC:
            kind = "normal"
        columns[f"x{place}"], others[f"x{place}"] = _column(
            kind, signal if place == 0 else rng.permutation(signal), rng
        )
    y = np.stack([_targets(kind, case, signal, rng) for kind in case.kinds()], 1)
    if case.repeated and case.rows > 3:
        half = case.rows // 2
        columns = {name: _repeat(values, half, case.rows) for name, values in columns.items()}
        y = np.concatenate([y[:half], y[:half], y[2 * half :]])
    return _contain(columns, case.container), y, _contain(others, case.container)


def _repeat(values: Any, half: int, rows: int) -> Any:
    order = np.r_[0:half, 0:half, 2 * half : rows]
    return values.iloc[order].reset_index(drop=True) if isinstance(values, pd.Series) else values[order]


def _column(kind: str, signal: np.ndarray, rng: np.random.Generator) -> tuple[Any, Any]:
    """A column, and four other values of its type."""
    rows = len(signal)
    missing = rng.random(rows) < 0.3
    wide = 10.0 ** rng.integers(-12, 13)
    match kind:
        case "wide":
            return wide * (signal + rng.choice([0, 1e3])), np.array([0, -wide, 1e3 * wide, np.nan])
        case "integer" | "boolean":
            low = (signal > 0).astype(bool) if kind == "boolean" else np.rint(3 * signal).astype(np.int64)
            return low, np.array([0, 1, 1, 0]).astype(low.dtype)
        case "large integer":
            return 2**53 + np.rint(1e3 * signal).astype(np.int64), np.array([0, 1, -1, 2**60])
        case "nullable":
            values = pd.Series(np.rint(3 * signal)).astype("Int64").mask(missing)
            return values, pd.Series([1, None, -4, 3], dtype="Int64")
        case "constant":
            return np.full(rows, 0.1), np.array([0.1, 0.1, 7, np.nan])
        case "missing" | "all missing":
            return np.where(missing | (kind == "all missing"), np.nan, signal), np.array([0, 1, np.nan, np.nan])
        case "wild":
            return np.where(missing & (signal > 0), 1e30, signal), np.array([0, -1e300, 1e300, np.nan])
        case "float32":
            return signal.astype(np.float32), np.array([0, 1, -3e38, np.nan], dtype=np.float32)
        case "category" | "levels" | "many levels":
            count = rows if kind == "many levels" else 3
            values = pd.Series([f"level {int(abs(4 * value)) % count}" for value in signal])
            others = pd.Series(["level 0", "unseen", "", "level 1"])
            return (values.astype("category"), others.astype("category")) if kind == "category" else (values, others)
        case "text and numbers":
            values = pd.Series([value if gone else f"{value:.1f}" for value, gone in zip(signal, missing, strict=True)])
            return values.astype(object), pd.Series([0.5, "0.5", "x", None], dtype=object)
        case "date":
            start = pd.Timestamp("2020-02-28")
            values = pd.Series([start + pd.Timedelta(days=int(100 * value)) for value in signal])
            return values.mask(missing), pd.Series([start, start, None, pd.Timestamp("2199-01-01")])
        case "bad cell":
            values = pd.Series([f"{value:.3f}" for value in signal])
            values[0] = "?"
            return values, pd.Series(["0.5", "-", "1,234.5", None], dtype=object)
    return signal, np.array([0.0, 1.0, -5.0, 0.3])


def _targets(kind: Any, case: Case, signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One output of this kind, shape (N,)."""
    rows = case.rows
    match case.shape:
        case "wild":
            z = signal + 0.3 * rng.normal(size=rows)
            z[rng.integers(rows)] = rng.choice([-1e6, 1e4])
        case "constant":
            z = np.full(rows, 0.7)
        case "two values":
            z = (signal > 0) * 1.0
        case "few values":
            z = rng.choice(rng.normal(size=5), rows)
        case "rounded":
            z = np.round(signal + 0.3 * rng.normal(size=rows), 1)
        case "point mass":
            z = np.where(rng.random(rows) < 0.6, 0.25, signal + rng.normal(size=rows))
        case "heavy":
            z = rng.standard_cauchy(rows)
        case "sharp":
            z = signal + 1e-4 * rng.normal(size=rows)
        case "bimodal":
            z = signal + 3 * rng.choice([-1, 1], rows)
        case _:
            z = signal + 0.3 * rng.normal(size=rows)
    if kind == "real":
        return case.scale * (z + case.offset)
    if kind == "positive":
        return case.scale * np.exp(np.clip(z, -40, 40))
    if kind == "count":
        return np.rint(np.exp(np.clip(z + case.exponent, 0, 25)))
    _, low, high = kind
    y = low + (high - low) * np.clip(1 / (1 + np.exp(-np.clip(z, -30, 30))), 1e-9, 1 - 1e-9)
    if case.at_ends and kind[0] == "interval":
        y = np.where(z > np.quantile(z, 0.8), high, y)
    return np.clip(y, low, high if kind[0] == "interval" else np.nextafter(high, low))


def _contain(columns: dict[str, Any], container: str) -> Any:
    if container == "numpy":
        return np.stack([pd.Series(values).to_numpy(dtype=float, na_value=np.nan) for values in columns.values()], 1)
    frame = pd.DataFrame(columns)
    if container == "pandas":
        return frame
    return pl.DataFrame({name: _polars(values) for name, values in frame.items()}, strict=False)


def _polars(values: pd.Series) -> pl.Series:
    if values.dtype == "category":
        return pl.Series(values.astype(object).tolist(), dtype=pl.Categorical)
    if values.dtype == object:
        return pl.Series([None if value is None else str(value) for value in values])
    return pl.from_pandas(values)
