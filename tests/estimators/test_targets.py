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
