"""The experiments on tables: forecasts against closed forms, and the whole path on a small table."""

import json
import math

import numpy as np
import pytest
from scipy.stats import norm

from experiments.command_line import select
from experiments.uci.data import TABLES, Split, Table, load
from experiments.uci.forecasts import GaussianForecast, QuantileForecast, SampleForecast
from experiments.uci.methods import METHODS, Method
from experiments.uci.report import report
from experiments.uci.run import run, work

RNG = np.random.default_rng(0)


def gaussian_crps(y, mean, scale):
    z = (y - mean) / scale
    return scale * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi))


@pytest.fixture(scope="module")
def rows():
    mean, scale = RNG.normal(size=50), RNG.uniform(0.5, 2, 50)
    return mean, scale, mean + scale * RNG.normal(size=50)


def forecasts(mean, scale):
    levels = (np.arange(199) + 0.5) / 199
    yield "gaussian", GaussianForecast(mean, scale), 1e-9
    yield "quantiles", QuantileForecast(mean[:, None] + scale[:, None] * norm.ppf(levels)), 0.01
    samples = mean[:, None] + scale[:, None] * np.random.default_rng(1).normal(size=(50, 4000))
    yield "samples", SampleForecast(samples), 0.02


def test_forecasts_agree_with_the_gaussian(rows):
    mean, scale, y = rows
    for name, forecast, tolerance in forecasts(mean, scale):
        assert forecast.crps(y) == pytest.approx(gaussian_crps(y, mean, scale).mean(), rel=tolerance), name
        assert np.abs(forecast.mean() - mean).max() < 5 * tolerance, name
        half = norm.ppf(0.95) * scale
        interval = forecast.interval(0.9)
        assert np.abs((interval - np.stack([mean - half, mean + half], 1)) / scale[:, None]).max() < 10 * tolerance, (
            name
        )
        if name == "quantiles":
            assert forecast.nll(y) is None
        else:  # the kernels of a sample widen it by some percent
            assert forecast.nll(y) == pytest.approx(-norm.logpdf(y, mean, scale).mean(), abs=2 * tolerance), name


def write_table(folder, rows=80):
    place = folder / "yacht"
    place.mkdir(parents=True)
    x = RNG.normal(size=(rows, 2))
    y = x[:, 0] + 0.1 * RNG.normal(size=rows)
    np.savetxt(place / "data.txt", np.column_stack([x, y]))
    np.savetxt(place / "index_features.txt", [0, 1])
    np.savetxt(place / "index_target.txt", [2])
    for split in range(2):
        order = np.random.default_rng(split).permutation(rows)
        np.savetxt(place / f"index_train_{split}.txt", order[:60])
        np.savetxt(place / f"index_test_{split}.txt", order[60:])


def test_splits_share_no_rows_and_noise_stays_within_the_rounding(tmp_path):
    write_table(tmp_path)
    table = next(table for table in TABLES if table.name == "yacht")
    split = load(table, 0, tmp_path)
    parts = [split.y, split.y_validation, split.y_test]
    assert [len(part) for part in parts] == [54, 6, 20]
    assert len(np.unique(np.concatenate(parts))) == 80
    rounded = load(Table("yacht", "yacht", step=0.5, dequantised=True), 0, tmp_path)
    assert 0 < np.abs(rounded.y_test - split.y_test).max() <= 0.25
    assert np.array_equal(rounded.x_test, split.x_test)


def test_missing_tables_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"boston.*git clone"):
        load(TABLES[0], 0, tmp_path)


def test_the_best_setting_of_the_validation_rows_is_kept():
    def fit(split, seed, shift):
        return lambda x: GaussianForecast(np.full(len(x), shift), np.ones(len(x)))

    split = Split(*[np.zeros((4, 1)), np.zeros(4)] * 3)
    outcome = Method("constant", fit, [{"shift": 3.0}, {"shift": 0.5}, {"shift": -2.0}]).run(split, seed=0)
    assert outcome.setting == {"shift": 0.5}
    assert outcome.predict(split.x_test).mean().tolist() == [0.5] * 4


def test_run_and_report(tmp_path, capsys):
    write_table(tmp_path)
    tables = select(TABLES, "yacht")
    small = {"n_members": 2, "epochs": 3, "width": 8}
    methods = [
        Method(method.name, method.fit, [{**setting, **small} for setting in method.settings], method.trial)
        for method in select(METHODS, "energy,mixture,deep-ensemble")
    ]
    pieces = work(tables, methods, 2)
    assert [(method.name, index) for _, method, index in pieces] == [
        (method.name, index) for index in range(2) for method in methods
    ]
    results = tmp_path / "results"
    assert run(pieces, tmp_path, results)
    record = json.loads((results / "yacht" / "energy" / "00.json").read_text())
    assert math.isfinite(record["nll"])
    assert record["crps"] > 0
    assert 0 <= record["coverage"] <= 1
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.json")}
    assert len(before) == 6
    assert run(pieces, tmp_path, results)
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.json")} == before
    report(results)
    text = (results / "README.md").read_text()
    assert "| yacht | 2 |" in text
    assert "NLL: first on" in text


def test_a_method_without_its_package_is_left_out(tmp_path, capsys):
    write_table(tmp_path)
    method = Method("absent", lambda split, seed: None, needs=("no_such_package_xyz",))
    assert not run(work(select(TABLES, "yacht"), [method], 1), tmp_path, tmp_path / "results")
    assert "no_such_package_xyz is not installed: absent is left out" in capsys.readouterr().out
