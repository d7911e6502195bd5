"""Rows in the order of time, or in groups, are held out as such: for the epoch, calibration and conformal scores."""

import json

import numpy as np
import pandas as pd
import pytest

from energyreg.estimators import core
from energyreg.estimators.splits import Order, SplitWarning
from energyreg.estimators.table import EnergyRegressor

N = 120
RNG = np.random.default_rng(0)
FRAME = pd.DataFrame({"day": pd.date_range("2024-01-01", periods=N), "x": RNG.normal(size=N)})
Y = FRAME["x"].to_numpy() + 0.1 * RNG.normal(size=N)
FAST = {"n_members": 1, "epochs": 1, "width": 8, "random_state": 0, "conformal": True, "calibrate": False}


@pytest.fixture
def parts(monkeypatch):
    """The rows of the last fit, once it was asked for."""
    seen = {}
    learn = core.learn

    def watched(settings, rows, *arguments, **options):
        seen.update({name: rows.known[getattr(rows, name)] for name in ("train", "held_out", "conformal")})
        return learn(settings, rows, *arguments, **options)

    monkeypatch.setattr(core, "learn", watched)
    return seen


def check_latest(parts, age):
    assert sum(map(len, parts.values())) == len(age)
    assert age[parts["train"]].max() < age[parts["held_out"]].min()
    assert age[parts["held_out"]].max() < age[parts["conformal"]].min()


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_latest_rows_are_held_out(parts, shuffled):
    order = RNG.permutation(N) if shuffled else np.arange(N)
    frame, y = FRAME.iloc[order], Y[order]
    EnergyRegressor(**FAST, split="time").fit(frame, y)
    check_latest(parts, order)
    EnergyRegressor(**FAST).fit(frame[["x"]], y, time=frame["day"].astype(str))
    check_latest(parts, order)
    EnergyRegressor(**FAST, split="time").fit(frame[["x"]].set_index(frame["day"]), y)
    check_latest(parts, order)
    weights = np.where(order % 5 == 0, 0.0, 1.0)  # rows of weight 0 are not there
    EnergyRegressor(**FAST).fit(frame[["x"]], y, weights, time=order)
    assert sum(map(len, parts.values())) == (weights > 0).sum()
    assert order[parts["train"]].max() < order[parts["held_out"]].min()


def test_without_dates_the_order_of_the_rows_is_that_of_time(parts):
    EnergyRegressor(**FAST, split="time").fit(FRAME[["x"]], Y)
    check_latest(parts, np.arange(N))


@pytest.mark.parametrize("kind", ["text", "number", "missing"])
def test_groups_stay_whole(parts, kind):
    groups = RNG.integers(0, 25, N)
    given = pd.Series([f"person {g}" for g in groups]) if kind == "text" else groups
    if kind == "missing":
        given = np.where(groups == 3, np.nan, groups)
    EnergyRegressor(**FAST).fit(FRAME[["x"]], Y, groups=given)
    known = groups != 3 if kind == "missing" else np.ones(N, bool)
    there = [set(groups[rows[known[rows]]]) for rows in parts.values()]
    assert not (there[0] & there[1] or there[0] & there[2] or there[1] & there[2])
    assert all(len(rows) >= 8 for rows in parts.values()) and sum(map(len, parts.values())) == N


@pytest.mark.parametrize("count", [2, 3, 10, 60])
def test_parts_of_groups_are_of_about_the_size_asked_for(count):
    groups = np.repeat(np.arange(60), 4) % count
    for held_out, conformal in ((24, 0), (0, 24), (24, 24)):
        if count == 2 and held_out and conformal:
            with pytest.raises(ValueError, match="groups has 2 different"):
                Order(groups=groups).split(240, held_out, conformal, np.random.default_rng(0))
            continue
        train, *held = Order(groups=groups).split(240, held_out, conformal, np.random.default_rng(0))
        assert len(train) >= 240 // count
        for rows, wanted in zip(held, (held_out, conformal), strict=True):
            assert (len(rows) > 0) == (wanted > 0) and len(rows) <= wanted + 240 // count


def test_rows_of_one_moment_stay_together():
    order = Order(time=np.repeat(np.arange(10), 12))
    train, held_out, _ = order.split(120, 15, 0, np.random.default_rng(0))
    assert (len(train), len(held_out)) == (96, 24)


@pytest.mark.parametrize("table", [FRAME, FRAME.iloc[::-1], FRAME.assign(day=FRAME["day"].astype(str)),
                                   FRAME[["x"]].set_index(FRAME["day"])])  # fmt: skip
def test_an_order_by_date_is_said(table):
    with pytest.warns(SplitWarning, match="in the order of .*drawn at random.*split='time'"):
        EnergyRegressor(**FAST).fit(table, Y)
    for quiet in ({"split": "random"}, {"split": "time"}, {"validation_fraction": None, "conformal": False}):
        EnergyRegressor(**{**FAST, **quiet}).fit(table, Y)
    EnergyRegressor(**FAST).fit(table.sample(frac=1, random_state=0), Y)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"split": "sorted"}, {}, "split is 'sorted'; expected one of 'auto', 'random', 'time'"),
        ({}, {"groups": [1, 2]}, r"groups has shape \(2, 1\); expected one value for each of the 120 rows"),
        ({}, {"time": ["soon"] * N}, "time holds text; expected dates or numbers"),
        ({}, {"time": np.arange(N), "groups": np.arange(N)}, "both given"),
        ({}, {"groups": np.zeros(N)}, "groups has 1 different value.*expected at least 3"),
    ],
)
def test_what_cannot_be_split_is_refused(options, given, message):
    with pytest.raises(ValueError, match=message):
        EnergyRegressor(**FAST, **options).fit(FRAME[["x"]], Y, **given)
    two = FRAME.assign(other=FRAME["day"])
    with pytest.raises(ValueError, match="several columns of dates: 'day', 'other'"):
        EnergyRegressor(**FAST, split="time").fit(two, Y)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_files_and_commands_split_alike(suffix, tmp_path, parts):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from energyreg.cli.app import app

    path, people = tmp_path / f"t.{suffix}", RNG.integers(0, 25, N)
    table = FRAME.assign(person=[f"p{p}" for p in people], y=Y)
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    regressor = EnergyRegressor(**FAST).fit_file(path, "y", drop=["person"], time_column="day")
    check_latest(parts, np.arange(N))
    assert list(regressor.feature_names_in_) == ["day", "x"]
    regressor = EnergyRegressor(**FAST).fit_file(path, "y", drop=["day"], group_column="person")
    assert list(regressor.feature_names_in_) == ["x"]
    of_file = {name: rows.tolist() for name, rows in parts.items()}
    EnergyRegressor(**FAST).fit(table[["x"]], Y, groups=table["person"])
    assert of_file == {name: rows.tolist() for name, rows in parts.items()}
    with pytest.warns(SplitWarning):
        EnergyRegressor(**FAST).fit_file(path, "y")

    def run(*options):
        tiny = ["--epochs", "1", "--members", "1", "--conformal", "-o", str(tmp_path / "m")]
        return CliRunner().invoke(app, ["fit", str(path), "-t", "y", *tiny, *options])

    assert "The rows are in the order of column 'day'" in run("-q").stderr
    result = run("-q", "--time-column", "day")
    assert (result.exit_code, result.stderr) == (0, "")
    check_latest(parts, np.arange(N))
    result = run("--json", "-q", "--group-column", "person", "--drop", "day")
    assert json.loads(result.stdout)["rows"] == N and not set(people[parts["train"]]) & set(people[parts["held_out"]])
    for options, message in (
        (["--time-column", "day", "--group-column", "person"], "are both given"),
        (["--group-column", "y"], "--group-column names 'y', which is a target"),
        (["--time-column", "no"], "there is no column 'no' that --time-column names"),
    ):
        assert (result := run(*options)).exit_code == 2 and message in result.stderr
