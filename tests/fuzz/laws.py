"""What holds of every fit, whatever the table: figures are finite, and the density is one."""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import energyreg
from energyreg.estimators.table import EnergyRegressor
from energyreg.evaluation import evaluate
from energyreg.training.failures import TrainingError
from tests.fuzz.cases import Case, make

SOURCE = str(Path(energyreg.__file__).parent)
MASS, LEVEL = 1e-3, 1e-3
"""Tolerances of the mass in user units, and of probabilities."""
FEW = 6
"""Rows of the training that are predicted."""
EDGES = torch.cat([torch.logspace(-6, -2, 20), torch.linspace(0.015, 0.985, 120), 1 - torch.logspace(-2, -6, 20)])


class Refused(Exception):
    """The library has said why it cannot fit this table."""


def check(case: Case) -> None:
    """Fit, save, load, predict, evaluate: all figures are finite and agree, or the refusal names its cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice; whatever numpy or torch warn of stays an error
        table, y, others = make(case)
        try:
            regressor = _fit(case, table, y)
        except Refused:
            return
        with tempfile.TemporaryDirectory() as folder:
            loaded = EnergyRegressor.load(regressor.save(Path(folder) / "model"))
        few = table[:FEW]
        check_predictions(regressor, few, y)
        if regressor.n_outputs_ == 1:
            check_density(regressor.predict_distribution(table[:1]), regressor)
        try:
            with refusals():
                loaded.encode(others)
        except Refused:
            pass
        else:
            check_predictions(loaded, others, y)
        np.testing.assert_allclose(loaded.predict(few), regressor.predict(few), rtol=1e-5, atol=1e-5 * _spread(y))
        scores = evaluate(regressor, [(few, y[:FEW])])
        for part in (scores.model, scores.marginal):
            for name, values in vars(part).items():
                unbounded = case.conformal and name in ("width", "winkler")  # a level beyond what the rows can show
                good = ~np.isnan(values) if unbounded else np.isfinite(values)
                assert good.all(), f"{name} of evaluate is not finite"
        if case.report:
            check_report(loaded, table, y)


def _spread(y: np.ndarray) -> float:
    return float(np.ptp(y))


def _fit(case: Case, table: Any, y: np.ndarray) -> EnergyRegressor:
    kinds = case.kinds()
    regressor = EnergyRegressor(
        target=kinds[0] if len(kinds) == 1 else kinds, n_members=case.n_members, epochs=2, width=8, num_components=2,
        base=case.base, outputs=case.outputs, conformal=case.conformal, random_state=case.seed,
    )  # fmt: skip
    weights = np.random.default_rng(case.seed).exponential(size=len(y)) if case.weighted else None
    with refusals():
        return regressor.fit(table, y[:, 0] if len(kinds) == 1 else y, sample_weight=weights)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn an error of the library's own that names its cause into `Refused`, and any other into a failure."""
    try:
        yield
    except (ValueError, TypeError, TrainingError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        named = re.search(r"\b(X|y|targets?|conformal|base|outputs|columns?|rows?)\b", str(error))
        if not where.filename.startswith(SOURCE) or named is None:
            raise AssertionError(f"a bare {type(error).__name__}: {error}") from error
        raise Refused(str(error)) from error


def check_predictions(regressor: EnergyRegressor, table: Any, y: np.ndarray) -> None:
    """All answers for some rows, and for the targets of the training."""
    one = regressor.n_outputs_ == 1
    p = regressor.predict_distribution(table)
    mean, median = p.mean.double(), p.median.double()
    for name, values in {
        "mean": mean, "variance": p.variance, "median": median, "interval": p.interval(0.9), "entropy": p.entropy(),
    }.items():  # fmt: skip
        assert values.isfinite().all(), f"{name} is not finite"
    assert (p.variance >= 0).all(), "variance is below 0"
    draws = p.sample((400,), generator=torch.Generator().manual_seed(0)).double()
    assert draws.isfinite().all() and _inside(regressor, draws).all(), "a draw is outside of the space"
    line = ~torch.tensor([bool(period) for period in regressor.target_.periods])
    seen = torch.cat([draws, torch.as_tensor(y)[:, None].expand(-1, p.num_rows, -1)])
    low, high = seen.amin(0), seen.amax(0)  # a rare target far out may carry the mean, and be in no draw
    slack = 1e-6 * (high - low) + 4 * torch.finfo(p.dtype).eps * mean.abs()
    within = (mean >= low - slack) & (mean <= high + slack)
    for row, output in (~within & line).nonzero().tolist()[:1]:
        place = (float(mean[row, output]), float(low[row, output]), float(high[row, output]))
        raise AssertionError("the mean is {:.3g}, beyond 400 draws and all targets, {:.3g} to {:.3g}".format(*place))
    interval = p.interval(0.9).numpy() if not regressor.conformal else regressor.predict_interval(table, 0.9)
    interval = interval.reshape(p.num_rows, -1, 2)
    assert (interval[..., 0] <= interval[..., 1]).all(), "an interval ends before it begins"
    if not regressor.conformal or not hasattr(regressor, "conformal_intervals_"):
        assert np.isfinite(interval).all()
    ends = torch.as_tensor(interval).movedim(-1, 0)
    assert (_inside(regressor, ends, ends=True) | ~line | ends.isinf()).all(), "an interval leaves the space"
    count = min(len(y), p.num_rows)
    densities = regressor.score_samples(table[:count], y[:count, 0] if one else y[:count])
    assert np.isfinite(densities).all(), "score_samples is not finite at a target of the training"
    if one:
        assert p.mode.isfinite().all(), "a mode is not finite"


def _inside(regressor: EnergyRegressor, values: Tensor, ends: bool = False) -> Tensor:
    """Whether values (*S, B, D) belong to the target space, or are its ends."""
    kinds = regressor.target_.kinds
    parts = []
    for kind, value in zip(kinds, values.double().unbind(-1), strict=True):
        here = torch.as_tensor(kind.possible(value.numpy())) if not kind.whole else value.isfinite()
        if len(kinds) > 1 and hasattr(kind, "low"):  # numbers of several outputs are float32, and the ends are not
            rounding = 4 * torch.finfo(torch.float32).eps * max(abs(kind.low), abs(kind.high))
            here = (value >= kind.low - rounding) & (value <= kind.high + rounding)
        parts.append(here | (value == 0) if ends and type(kind).__name__ == "Positive" else here)
    return torch.stack(parts, -1)


def check_density(p: Any, regressor: EnergyRegressor) -> None:
    """cdf, its inverse and the density of a row of one output agree, and it integrates to one in user units."""
    levels = EDGES.double()[:, None].expand(-1, p.num_rows)
    edges = p.icdf(levels).double()
    assert edges.isfinite().all() and (edges.diff(dim=0) >= 0).all(), "the quantiles do not rise"
    back = p.cdf(edges[..., None]).double()
    ulp = np.spacing(edges.abs().max().item() if p.dtype == torch.float64 else np.float32(edges.abs().max().item()))
    one_number = ulp * float(p.prob(edges[..., None]).max())
    if ulp > 1e-6 * float((edges[-10] - edges[10]).min()) or one_number > LEVEL / 2:
        return  # so narrow that its numbers cannot be told apart, or that one number holds too much
    off = float((back - levels).abs().max())
    assert off < LEVEL, f"cdf(icdf(q)) is off by {off:.2g}"
    low, high = _ends(regressor)
    within = edges[:, 0].unique()
    total = _mass(p, torch.cat([_beyond(within, low, -1).flip(0), within, _beyond(within, high, 1)]))
    assert abs(total - 1) < MASS, f"the density integrates to {total:.5f}"


def _beyond(edges: Tensor, end: float, side: int) -> Tensor:
    """Places from the outermost edge on: ever farther where the space goes on, ever closer to its end otherwise."""
    edge = edges[0] if side < 0 else edges[-1]
    if math.isinf(end):
        return edge + side * (edges[-1] - edges[0]) * 2.0 ** torch.arange(-20.0, 40.0).double()
    return end + (edge - end) * 2.0 ** -torch.arange(1.0, 50.0).double()


def _mass(p: Any, edges: Tensor, most: int = 2_000) -> float:
    """The integral of the density of one row, by halving cells until their masses are those that the cdf says."""
    nodes, weights = (torch.as_tensor(each) / 2 for each in np.polynomial.legendre.leggauss(8))
    cdf, total, count = p.cdf(edges[:, None, None])[:, 0].double(), 0.0, 0
    low, high, expected = edges[:-1], edges[1:], cdf.diff()
    while len(low):
        width = high - low
        places = (low + high) / 2 + width * nodes[:, None]
        density = p.log_prob(places.reshape(-1, 1, 1)).double().exp().view(places.shape)
        assert not density.isnan().any(), "log_prob is NaN"
        mass = (density * weights[:, None]).sum(0) * width
        count += len(low)
        good = ((mass - expected).abs() < 3e-6 + 1e-3 * expected) | (count > most)
        total += float(mass[good].sum())
        low, high, middle = low[~good], high[~good], ((low + high) / 2)[~good]
        left = p.cdf(middle[:, None, None])[:, 0].double() - p.cdf(low[:, None, None])[:, 0].double()
        expected = torch.cat([left, expected[~good] - left])
        low, high = torch.cat([low, middle]), torch.cat([middle, high])
    return total


def _ends(regressor: EnergyRegressor) -> tuple[float, float]:
    kind = regressor.target_.kinds[0]
    if type(kind).__name__ == "Positive":
        return 0.0, math.inf
    return getattr(kind, "low", -math.inf), getattr(kind, "high", math.inf)


def check_report(regressor: EnergyRegressor, table: Any, y: np.ndarray) -> None:
    """The page shows no figure that is none."""
    import pandas as pd

    from energyreg.reports.page import render
    from energyreg.reports.table_report import describe

    frame = table if isinstance(table, pd.DataFrame) else pd.DataFrame(np.asarray(table))
    names = [f"y{place}" for place in range(y.shape[1])]
    page = re.sub(
        r"<(script|style|svg).*?</\1>|<[^>]*>", " ", render(describe(regressor, frame, y, names, title="t")), flags=re.S
    )
    found = re.search(r".{40}\b(nan|inf|NaN|None)\b.{40}", page)
    assert found is None, f"the report says {found.group()!r}"
