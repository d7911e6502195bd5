"""The experiments on images: every method on made-up rows, the report, and what the tasks do to their targets."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scoringrules")

import energyreg as er
from experiments.images import data, features, methods, report, scores
from experiments.images.data import TASKS, Fold, Rows, Task, dequantise
from experiments.images.methods import METHODS, Method, Outcome
from experiments.images.run import path_of, run, work

ROWS, FEATURES = 60, 8


def made_up(dim: int) -> Fold:
    """Rows whose targets are a line with noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS + 40, FEATURES)).astype(np.float32)
    y = 3.0 * x[:, :dim] + rng.normal(size=(len(x), dim))
    split = Rows(x[:ROWS], y[:ROWS], x[ROWS:-20], y[ROWS:-20], x[-20:], y[-20:])
    return Fold(split, y[-20:], [1.0] * dim if dim > 1 else None)


def small(name: str) -> Task:
    """A task of that name on made-up rows, with two passes over them."""
    task = next(task for task in TASKS if task.name == name)
    dim = len(task.targets)
    return dataclasses.replace(task, load=lambda *_: made_up(dim), epochs=2, batch=16, seeds=2)


@pytest.fixture(scope="module", autouse=True)
def small_networks() -> Iterator[None]:
    """Small networks and few draws: what is tested does not depend on their sizes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WIDTH": 16, "HEAD_WIDTH": 8, "MEMBERS": 2, "CHAIN_SAMPLES": 16}.items():
            patch.setattr(methods, name, value)
        patch.setattr(methods, "COMPONENTS", (2, 4))
        patch.setattr(scores, "SCORED_ROWS", 10)
        patch.setattr(scores, "DRAWS", 8)
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every method on two small tasks, with one and with three targets."""
    folder = tmp_path_factory.mktemp("results")
    tasks = [small("age"), small("pose")]
    assert run(work(tasks, METHODS, 1), Path(), Path(), folder)
    # A second seed of what the verdicts compare.
    few = [method for method in METHODS if method.name in ("gaussian", "mixture", "ours", "direct-l1")]
    assert run(work(tasks[:1], few, 2), Path(), Path(), folder)
    return folder


def test_every_method_gives_finite_scores(results: Path) -> None:
    seen = set()
    for path in results.glob("*/*/0.json"):
        record = json.loads(path.read_text())
        seen.add((record["task"], record["method"]))
        for score in ("nll", "mae", "crps", "coverage", "width", "validation_nll", "fit_seconds"):
            assert math.isfinite(record[score]), (path, score)
        assert 0 <= record["coverage"] <= 1 and record["width"] > 0 and record["mae"] > 0
        assert len(record["mae_by_target"]) == len(small(record["task"]).targets)
        assert ("mae_refined" in record) == (record["method"] == "nce")
        assert all(math.isfinite(nll) for nll in record["variants"].values())
        if record["method"] == "mixture":
            assert set(record["variants"]) == {"2", "4", "2, strong", "4, strong", "calibrated"}
            chosen = record["setting"]
            name = chosen["chosen"] + (", strong" if chosen["regularisation"] == "strong" else "")
            assert record["variants"][name] == record["nll"]
    expected = {(task.name, m.name) for task in (small("age"), small("pose")) for m in METHODS if m.suits(task)}
    assert seen == expected
    assert ("age", "mixture-atoms") not in seen and ("pose", "ours-tuned") in seen


def test_a_mixture_with_slabs_is_told_of_the_atoms() -> None:
    rng = np.random.default_rng(0)
    fold = made_up(1)
    y = np.where(rng.random((ROWS, 1)) < 0.5, 0.05 * rng.uniform(-1, 1, (ROWS, 1)), fold.split.y)
    split = dataclasses.replace(fold.split, y=y, slabs=((-0.05, 0.05),))
    model = methods._slab_mixture(split, 2, 0.0)
    model.fit_preprocessing(split.x, split.y)
    torch.nn.init.normal_(model.proposal.module.weights.weight)
    p = model.double().eval()(split.x[:3])
    grid = np.sort(
        np.concatenate([np.linspace(-60, 60, 40_001), [-0.05 - 1e-6, -0.05 + 1e-6, 0.05 - 1e-6, 0.05 + 1e-6]])
    )
    density = p.prob(torch.as_tensor(grid)[:, None, None].expand(-1, 3, 1)).numpy()
    # Edges are rounded to single precision: 1e-6 of a slab that is up to ten high.
    np.testing.assert_allclose(np.trapezoid(density, grid, axis=0), 1, atol=1e-3)
    inside, beside = p.prob(torch.tensor([0.049, 0.051])[:, None, None].expand(-1, 3, 1)).numpy()
    log_weights = model.energy(torch.as_tensor(split.x[:3]).double()).q.log_weights
    np.testing.assert_allclose(inside - beside, log_weights[:, 1].exp().detach() / 0.1, rtol=1e-2)


def test_a_setting_that_diverges_is_not_chosen() -> None:
    def diverges(*_: object) -> tuple[object, float]:
        raise er.TrainingError("the loss is nan")

    good = methods._candidate(lambda split, dropout: methods._mixture(split, 1, dropout))
    fold, task = made_up(1), small("age")
    outcome = methods._tuned(lambda: {"bad": diverges, "good": good})(task, fold.split, 0)
    assert outcome.setting["chosen"] == "good" and set(outcome.variants) == {"good", "good, strong", "calibrated"}
    with pytest.raises(er.TrainingError, match="the loss is nan"):
        methods._tuned(lambda: {"bad": diverges})(task, fold.split, 0)


def test_direct_regression_is_least_squares_with_the_validation_residuals_as_scale() -> None:
    fold, task = made_up(1), small("age")
    method = next(method for method in METHODS if method.name == "direct-l2")
    outcome = method.fit(task, fold.split, 0)
    p = outcome.predict(fold.split.x_validation)
    residuals = p.mean.double().numpy() - fold.split.y_validation
    scale = math.sqrt(float(np.mean(residuals**2)))
    expected = 0.5 * math.log(2 * math.pi * scale**2) + 0.5  # mean -log N at its own residual spread
    assert outcome.validation_nll == pytest.approx(expected, abs=1e-3)
    np.testing.assert_allclose(p.variance.sqrt().double().numpy(), scale, rtol=1e-2)


def test_a_training_that_diverges_is_a_result(tmp_path: Path) -> None:
    def diverges(*_: object) -> Outcome:
        raise er.TrainingError("the loss is nan")

    method = Method("learned", "", diverges)
    assert run([(small("age"), method, 0)], Path(), Path(), tmp_path)
    record = json.loads((tmp_path / "age" / "learned" / "0.json").read_text())
    assert record["diverged"] and record["nll"] is None and record["error"] == "the loss is nan"
    report.report(tmp_path)
    assert "| learned | 1 | diverged |" in (tmp_path / "README.md").read_text()


def test_a_result_that_is_there_is_not_made_again(results: Path) -> None:
    piece = (small("age"), METHODS[0], 0)
    path = path_of(piece, results)
    before = path.stat().st_mtime_ns
    assert run([piece], Path(), Path(), results)
    assert path.stat().st_mtime_ns == before


def test_the_report_has_tables_verdicts_and_pictures(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.report(results, tmp_path / "pictures")
    text = (results / "README.md").read_text()
    for part in ("## Targets", "NLL below the mixture's", "The teacher", "Age MAE", "Head pose", "## age", "## pose"):
        assert part in text
    for task in ("age", "pose"):
        assert 1_000 < (tmp_path / "pictures" / f"{task}.png").stat().st_size < 150_000


def test_differences_are_paired_by_seed() -> None:
    records = {
        ("age", "ours"): {0: {"nll": 1.0}, 1: {"nll": 2.0}, 2: {"nll": 9.0}},
        ("age", "mixture"): {0: {"nll": 1.5}, 1: {"nll": 2.7}},
    }
    found = report.difference(records, "age", "ours", "mixture")
    np.testing.assert_allclose(found, [-0.5, -0.7])
    assert report.standard_error(found) == pytest.approx(0.1)
    assert report._beyond(found) and not report._beyond(-found) and not report._beyond(found[:1])


def test_noise_stays_in_the_cell_and_is_the_same_each_time() -> None:
    y = np.arange(50.0)[:, None]
    noisy = dequantise(y, 1.0, "age")
    assert (np.rint(noisy) == y).all() and noisy.std() > 0 and not (noisy == y).any()
    np.testing.assert_array_equal(noisy, dequantise(y, 1.0, "age"))
    assert not np.array_equal(noisy, dequantise(y, 1.0, "cells"))


def test_the_resolution_of_steering_is_found() -> None:
    levels = np.arange(-97, 98) / 97
    angles = np.random.default_rng(0).choice(levels, 400)
    assert data.steering_step(angles) == pytest.approx(1 / 97, rel=1e-6)


def test_grid_keeps_places_and_stages_have_all_channels() -> None:
    pytest.importorskip("timm")

    from energyreg.networks.image_encoders import ImageEncoder

    torch.manual_seed(0)
    encoder = ImageEncoder("timm:tf_efficientnet_lite0")
    images = torch.randint(0, 256, (2, 3, 64, 128), dtype=torch.uint8)
    grid = features.Grid(encoder, 2, 4).eval()
    cells = grid(images).reshape(2, -1, 2, 4)
    assert cells.shape[1] * 8 == grid.num_features
    encoder = ImageEncoder("timm:tf_efficientnet_lite0")
    encoder.load_state_dict(grid.encoder.state_dict())
    stages = features.Stages(encoder).eval()
    found = stages(images)
    assert found.shape == (2, stages.num_features)
    # The mean of the last stage's fields of equal size is its mean over the picture.
    torch.testing.assert_close(cells.mean((2, 3)), found[:, -cells.shape[1] :])
