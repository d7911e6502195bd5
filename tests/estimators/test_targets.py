"""The kinds of target: parsed once, alike however they are given, and what each says of rounding and of ranges."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import energyreg as er
from energyreg.cli import app
from energyreg.estimators.targets import Bounded, Circular, Count, Positive, Real, Target
from energyreg.evaluation import evaluate, evaluate_linear
from energyreg.reports import table_report

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("given", "outputs", "kinds", "periods"),
    [
        ("real", 2, [Real(), Real()], [0, 0]),
        ("positive", 1, [Positive()], [0]),
        (("interval", 0, 10), 1, [Bounded(0.0, 10.0)], [0]),
        (["count", ["interval", 0, 1], ("circle", 9, 12)], 3, [Count(), Bounded(0, 1), Circular(9, 12)], [0, 0, 3]),
    ],
)  # fmt: skip
def test_every_way_to_say_it_is_parsed(given, outputs, kinds, periods):
    target = Target.parse(given, outputs)
    assert target.kinds == kinds and target.periods == periods and target.space().dim == outputs
    if outputs == 1:
        assert Target.parse([given], 1) == target


def test_a_space_is_copied_unfitted():
    space = er.spaces.Real(2)
    space.fit(torch.randn(9, 2))
    copied = Target.parse(space, 2).space()
    assert bool(space.fitted) and not bool(copied.fitted) and copied is not space


@pytest.mark.parametrize("given", ["count", "positive", ("interval", 0, 2), "real"])
def test_bins_hold_their_values_and_stay_in_the_space(given):
    target = Target.parse(given, 1)
    values = np.array([[0.0], [1.0], [2.0]]) + (given == "positive")
    low, high = target.bins(values, 1.0)
    assert (low <= values).all() and (values <= high).all() and (low < high).all()
    noisy = target.dequantise(values, [1.0], np.random.default_rng(0))
    target.space().check(torch.as_tensor(noisy))
    assert target.dequantise(values, [0.0], RNG) is values
    if given == "count":
        assert np.array_equal(target.round(noisy), values)


def test_of_several_outputs_those_with_an_end_are_not_dequantised():
    values = np.tile(np.arange(4.0), 10)
    table = np.stack([values, values, values, np.random.default_rng(0).normal(size=40)], 1)
    target = Target.parse(["real", ("interval", 0, 3), "count", "real"], 4)
    assert target.rounding_steps(table) == [1.0, 0.0, 1.0, 0.0]
    noise = target.dequantise(table, [1.0, 0.0, 1.0, 0.0], np.random.default_rng(1)) - table
    assert (noise[:, [1, 3]] == 0).all() and 0.3 < np.abs(noise[:, [0, 2]]).max() <= 0.5


def test_a_list_of_one_is_that_one_everywhere(tmp_path):
    """Scores, report, probabilities, intervals and the command line, of counts whose means could fall below zero."""
    rng = np.random.default_rng(0)
    x = pd.DataFrame(rng.normal(size=(80, 2)), columns=["a", "b"])
    y = rng.poisson(np.exp(0.8 * x["a"])).astype(float)
    answers = []
    for name, target in (("word", "count"), ("list", ["count"])):
        regressor = er.EnergyRegressor(target=target, n_members=1, epochs=2, width=8, random_state=0).fit(x, y)
        scores = evaluate(regressor, [(x, y[:, None])])
        linear = evaluate_linear(regressor, x, y[:, None])
        page = table_report.describe(regressor, x, y[:, None], ["y"], title="counts")
        path = regressor.save(tmp_path / name)
        x.assign(y=y).to_csv(tmp_path / "t.csv", index=False)
        asked = ["evaluate", str(path), str(tmp_path / "t.csv"), "--target", "y", "--json"]
        done = CliRunner().invoke(app.app, asked)
        assert done.exit_code == 0, done.output
        answers.append(
            {
                "model": scores.model.summary(),
                "marginal": scores.marginal.summary(),
                "linear": linear.summary(),
                "report": [section.paragraphs for section in page.sections],
                "probabilities": regressor.predict_probabilities(x[:5], np.arange(9)).tolist(),
                "quantiles": regressor.predict_quantiles(x).tolist(),
                "printed": json.loads(done.stdout)["scores"],
            }
        )
    assert answers[0] == answers[1]


# ---------------------------------------------------------------------------------------------- values that recur

SMALL = {"n_members": 1, "epochs": 3, "width": 8, "num_components": 2, "random_state": 0}
INPUTS = RNG.uniform(-1, 1, (400, 2))
SMOOTH = np.exp(np.sin(3 * INPUTS[:, 0]) + 0.3 * RNG.normal(size=400))


def truncated(values):
    """Multiples of 1/97 as 16-bit numbers hold them, cut off."""
    return np.trunc(np.rint(values * 97) / 97 * 32767) / 32767


@pytest.mark.parametrize(
    ("values", "step"),
    [
        (truncated(np.clip(RNG.normal(size=1000), -1, 1)), 1 / 97),
        (truncated(np.clip(RNG.normal(size=1000), -1, 1)).astype(np.float32).astype(float), 1 / 97),
        (RNG.choice([0.1, np.pi, 27.18281828], 300), np.pi - 0.1),
        (RNG.choice(np.sqrt(np.arange(9.0)), 300), np.sqrt(8) - np.sqrt(7)),
        (RNG.choice([0.0, 0.1 + 0.2, 0.3, 5.0], 300), 0.3),
    ],
)
def test_few_values_off_an_exact_grid_are_rounded_ones(values, step):
    found = Real().rounding_step(values)
    assert abs(found / step - 1) < 0.01
    low, high = Real().bins(np.unique(values), found)
    if not np.isclose(step, 0.3):  # two of those are one value, up to rounding
        assert (high[:-1] <= low[1:] + 1e-3 * step).all()


@pytest.mark.parametrize("values", [RNG.normal(size=300), np.repeat(RNG.normal(size=50), 6), RNG.normal(size=9)])
def test_values_without_a_least_gap_are_not(values):
    assert Real().rounding_step(values) is None


@pytest.mark.filterwarnings("ignore:The calibration chose")  # the models are hardly trained
@pytest.mark.parametrize(
    ("target", "atoms", "where"),
    [
        ("real", {0.0: 0.6}, "exactly 0 in 0.6"),
        ("real", {0.0: 0.3, 2.5: 0.1}, "exactly 0 in 0.3.*, 2.5 in 0.1"),
        ("positive", {1e-9: 0.4}, "exactly 1e-09 in 0.4"),
        (("interval", 0, 50), {0.0: 0.3, 50.0: 0.2}, "exactly 0 in 0.3.*, 50 in 0.2"),
    ],
)
def test_point_masses_among_continuous_values_are_said_and_learned(target, atoms, where):
    y, start = SMOOTH.copy(), 0
    order = np.random.default_rng(1).permutation(len(y))
    for value, fraction in atoms.items():
        stop = start + round(fraction * len(y))
        y[order[start:stop]], start = value, stop
    with pytest.warns(UserWarning, match=f"y has point masses among continuous values: {where}") as caught:
        fitted = er.EnergyRegressor(target=target, **SMALL).fit(INPUTS, y)
    assert sum("point masses" in str(warning.message) for warning in caught) == 1 and fitted.lattice_step_ is None
    p = fitted.predict_distribution(INPUTS)
    for value, fraction in atoms.items():
        near = 2e-3 * max(abs(value), 1e-12 if target == "positive" else 1)
        low, high = (torch.full((1, len(y), 1), value + side * near, dtype=torch.double) for side in (-1, 1))
        assert abs(float((p.cdf(high) - p.cdf(low)).mean()) - fraction) < 0.1
    assert np.isfinite(fitted.score_samples(INPUTS, y)).all()


@pytest.mark.parametrize(
    ("target", "y", "said"),
    [
        ("real", np.repeat(np.random.default_rng(0).normal(size=80), 5), "y takes only 80 distinct values in 400 rows"),
        (("circle", 0, 360), np.tile(np.arange(0, 360, 9.0), 10), "y takes only 40 distinct"),
        ("real", np.stack([SMOOTH, np.where(SMOOTH < 1, 0, SMOOTH)], 1), "y, column 1, has point masses.*exactly 0"),
    ],
)  # fmt: skip
def test_a_likelihood_that_spikes_can_earn_is_said(target, y, said):
    y = y.reshape(len(y), -1)
    parsed = Target.parse(target, y.shape[1])
    with pytest.warns(UserWarning, match=said) as caught:
        edges = parsed.atoms(y, parsed.rounding_steps(y), "y")
    assert len(caught) == 1 and "spikes at these values" in str(caught[0].message) and len(edges) == 0
