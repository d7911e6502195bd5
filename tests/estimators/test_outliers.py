"""Wild targets: found where no tail explains them, named, and without effect on the model."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from energyreg import EnergyRegressor
from energyreg.estimators.outliers import fences_of

TINY = {"n_members": 1, "epochs": 3, "width": 8, "num_components": 2, "random_state": 0}
RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (400, 2))
M = np.sin(3 * X[:, 0])
Y = M + 0.1 * RNG.normal(size=400)


def outside(values):
    low, high = fences_of(np.asarray(values, dtype=float))
    return np.flatnonzero((values < low) | (values > high))


@pytest.mark.parametrize("rows", [60, 1_000, 20_000])
@pytest.mark.parametrize(
    "draw",
    [
        lambda g, n: g.normal(size=n), lambda g, n: g.uniform(size=n), lambda g, n: g.standard_t(2, size=n),
        lambda g, n: g.standard_cauchy(n), lambda g, n: np.exp(3 * g.normal(size=n)), lambda g, n: g.poisson(0.02, n),
        lambda g, n: g.negative_binomial(0.1, 0.01, n), lambda g, n: 1 / g.uniform(size=n), lambda g, n: np.arange(n),
        lambda g, n: np.where(g.uniform(size=n) < 0.6, 0, np.exp(3 + 2 * g.normal(size=n))),
        lambda g, n: np.where(g.uniform(size=n) < 0.9, 0, 1000) + g.normal(size=n),
    ],
    ids=["normal", "uniform", "t", "cauchy", "log-normal", "rare", "counts", "pareto", "even", "zeros", "two"],
)  # fmt: skip
def test_a_tail_is_no_reason_to_leave_a_value_out(draw, rows):
    """Each of these finds something in fewer than 1 % of samples; the seeds are fixed."""
    assert len(outside(draw(np.random.default_rng(rows), rows))) == 0


@pytest.mark.parametrize(
    ("rows", "wild"),
    [
        (50, [1e5]),
        (60, [-1e6, 1e5]),
        (500, [1.1e4, -1.3e4, 0.8e4, -0.9e4, 1.2e4]),
        (500, [-5e3] * 9 + [4e3] * 9),
        (500, [-1e3]),
        (500, [1e5, -3e3, 1e4]),
        (500, [300.0] * 5),
        (5_000, [1e3, 1e9, -1e30]),
    ],
)
def test_wild_values_are_found_on_both_sides(rows, wild):
    values = np.random.default_rng(rows).normal(size=rows)
    values[3 : 3 + len(wild)] = wild
    assert outside(values).tolist() == list(range(3, 3 + len(wild)))


@pytest.mark.parametrize(
    ("target", "y", "wild", "named"),
    [
        ("real", Y, {5: 1e5}, "1 wild value far from all others: 100000 in row 5 "),
        ("real", Y, {5: 1e4, 9: -1e3, 11: 2e6, 20: -1e4}, "-1000 in row 9"),
        ("positive", np.exp(Y), {5: 1e-30}, "1e-30 in row 5"),
        ("positive", np.exp(Y), {5: 1e30}, r"1e\+30 in row 5"),
        ("count", np.rint(np.exp(M) * 5), {5: 10.0**7}, r"1e\+07 in row 5"),
        ("real", np.stack([Y, -Y], 1), {(5, 1): 1e5}, "100000 in row 5, column 1"),
        ("real", np.rint(20 * Y), {5: 1234.5678}, "1234.57 in row 5"),
    ],
)
def test_a_wild_target_is_named_and_the_model_is_that_of_the_other_rows(target, y, wild, named):
    with_wild = y.copy()
    for place, value in wild.items():
        with_wild[place] = value
    rows = [place if isinstance(place, int) else place[0] for place in wild]
    with pytest.warns(UserWarning, match=named) as caught:
        fitted = EnergyRegressor(target=target, **TINY).fit(X, with_wild)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean = EnergyRegressor(target=target, **TINY).fit(X, y)
    others = np.setdiff1d(np.arange(len(y)), rows)
    assert fitted.lattice_step_ == clean.lattice_step_
    gap = fitted.score_samples(X[others], y[others]).mean() - clean.score_samples(X[others], y[others]).mean()
    assert abs(gap) < 0.1


def test_wild_targets_of_an_eval_set_do_not_choose_the_epoch():
    y = Y[300:].copy()
    y[7] = -1e6
    with pytest.warns(UserWarning, match=r"y of eval_set has 1 wild value .*: -1e\+06 in row 7"):
        fitted = EnergyRegressor(**TINY).fit(X[:300], Y[:300], eval_set=(X[300:], y))
    clean = EnergyRegressor(**TINY).fit(X[:300], Y[:300], eval_set=(np.delete(X[300:], 7, 0), np.delete(y, 7)))
    assert np.array_equal(fitted.predict(X), clean.predict(X))


def test_conformal_scores_count_wild_targets_too():
    """Their coverage holds over all rows, so that none may be left out."""
    y = Y.copy()
    y[::100] = 1e4
    with pytest.warns(UserWarning, match="4 wild values"):
        fitted = EnergyRegressor(**TINY, conformal=True, validation_fraction=0.3).fit(X, y)
    assert len(fitted.conformal_intervals_.scores[None]) == 120
