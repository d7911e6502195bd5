"""Scenes with a border that is hidden at random: the truth is one, and densities are normalised and judged rightly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from energyreg.objectives import NCEWithLearnedProposal
from experiments.detection import scenes as experiment
from experiments.detection.scenes import Borders, Judged, MixtureEnergyNetwork, draw, judge_energy, report, run


def _scenes(count: int, seed: int = 0) -> experiment.Scenes:
    return draw(count, torch.Generator().manual_seed(seed))


def test_true_density_integrates_to_one() -> None:
    scenes = _scenes(4)
    step = 0.5 * experiment.ANNOTATION
    # A step of half a deviation leaves an error below 1e-12 for a Gaussian; five deviations, below 1e-6.
    known = torch.arange(-5.0, 5.01, 0.5) * experiment.ANNOTATION
    right = torch.arange(0.0, 64.0, step)
    grid = torch.stack(torch.meshgrid(known, known, right, known, indexing="ij"), -1).reshape(-1, 1, 4)
    left, top, bottom = scenes.places.unbind(1)
    boxes = grid + torch.stack([left, top, torch.zeros(4), bottom], 1)
    total = scenes.log_prob(boxes).double().exp().sum(0) * step**4
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.double), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        scenes.right_density(right[:, None].expand(-1, 4)).sum(0) * step, torch.ones(4), rtol=0, atol=1e-4
    )


def test_annotated_boxes_are_drawn_from_it() -> None:
    """Probability integral transforms of the right border are uniform, where it is hidden and where it is seen."""
    scenes = _scenes(4000)
    standard = torch.distributions.Normal(0.0, 1.0)
    places = ((scenes.boxes[:, 2:3] - scenes.rights) / experiment.ANNOTATION,)
    transform = (standard.cdf(places[0]) * scenes.chances).sum(1)
    for rows in (scenes.hidden, ~scenes.hidden):
        values = transform[rows].sort().values
        distance = (values - torch.linspace(0, 1, len(values))).abs().max()
        assert distance < 1.95 / math.sqrt(len(values))  # Kolmogorov and Smirnov: one in a thousand is beyond
    long = (scenes.boxes[:, 2] > scenes.rights.mean(1)).float()
    surprise = (long - scenes.chances[:, 1])[scenes.hidden]
    assert surprise.mean().abs() < 4 * 0.5 / math.sqrt(len(surprise))


def test_a_hidden_end_leaves_no_trace() -> None:
    scenes = _scenes(300)
    plate = torch.tensor([0.75, 0.75, 0.6])
    for number in scenes.hidden.nonzero()[:, 0].tolist():
        _, top, bottom = scenes.places[number].tolist()
        first, last = (scenes.rights[number] + torch.tensor([-1.0, 1.0])).tolist()
        patch = scenes.images[number, :, math.ceil(top) : int(bottom), math.ceil(first) : int(last)].flatten(1)
        error = experiment.TEXTURE / math.sqrt(patch.shape[1])
        assert bool(((patch.mean(1) - plate).abs() < 5 * error).all())


def test_the_energys_normaliser_is_that_of_quadrature() -> None:
    """Against Gauss and Hermite's rule for E_q[exp g], as the energy is log q + g with a Gaussian q."""
    torch.manual_seed(0)
    model = MixtureEnergyNetwork(1, NCEWithLearnedProposal(4)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.energy_head.output.weight, std=0.5)
    scenes = _scenes(2)
    judged = judge_energy(model, scenes, torch.Generator().manual_seed(0))
    nodes, weights = (torch.tensor(each, dtype=torch.float32) for each in np.polynomial.hermite_e.hermegauss(9))
    grid = torch.stack(torch.meshgrid(*[nodes] * 4, indexing="ij"), -1).reshape(-1, 1, 4)
    share = torch.stack(torch.meshgrid(*[weights / weights.sum()] * 4, indexing="ij"), -1).prod(-1).reshape(-1, 1)
    q, space = model.distribution(scenes), Borders(scenes.reference)
    z = q.means[:, 0] + q.scales[:, 0] * grid
    log_q = q.log_prob(z) + space.log_abs_det_jacobian(z)
    g = model.log_density(scenes)(space.to_user(z)) - log_q
    assert float(g.std(0).min()) > 0.1  # there is something to normalise
    log_z = (g.double() + share.double().log()).logsumexp(0)
    expected = model.log_density(scenes)(scenes.boxes).double() - log_z
    assert bool((judged.effective > 100).all())
    error = 4 * float(judged.effective.rsqrt().max())
    torch.testing.assert_close(judged.log_prob.double(), expected, rtol=0, atol=error)
    step = judged.places[1] - judged.places[0]
    torch.testing.assert_close(judged.density.sum(0) * step, torch.ones(2), rtol=0, atol=1e-4)
    # No box that was looked at is denser than the one that is called the densest.
    top = model.log_density(scenes)
    assert bool((top(judged.best) >= top(space.to_user(z)).amax(0) - 1e-4).all())


def test_borders_are_coordinates() -> None:
    scenes = _scenes(5)
    space = Borders(scenes.reference.double())
    boxes = scenes.boxes.double()
    torch.testing.assert_close(space.to_user(space.to_model(boxes)), boxes)

    def coordinates(y: Tensor) -> Tensor:
        return space.to_model(y[None].expand(5, 4))[2]

    jacobian = torch.autograd.functional.jacobian(coordinates, boxes[2])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], space.log_abs_det_jacobian(boxes)[2])


def test_the_truth_gets_full_marks_and_a_single_peak_does_not() -> None:
    scenes = _scenes(60)
    places = experiment._range(scenes, 400)[0]
    best = torch.cat([scenes.places[:, :2], scenes.rights[:, 1:], scenes.places[:, 2:]], 1)
    truth = Judged(scenes.log_prob(scenes.boxes), places, scenes.right_density(places), best, torch.full((60,), 9.0))
    marks = experiment.scores(truth, scenes)
    for part in ("hidden", "seen"):
        assert abs(marks[part]["kl"]) < 1e-6 and marks[part]["mass_error"] < 0.01
    assert marks["hidden"]["both"] == 1.0 and marks["hidden"]["scenes"] + marks["seen"]["scenes"] == 60
    single = (-0.5 * ((places - scenes.rights.mean(1)) / 6).square()).exp() / (6 * math.sqrt(2 * math.pi))
    broad = Judged(truth.log_prob, places, single, best, truth.effective)
    assert experiment.scores(broad, scenes)["hidden"]["both"] == 0.0


def test_run_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "TEST", 12)
    monkeypatch.setattr(experiment, "NODES", 16)
    monkeypatch.setattr(experiment, "DRAWS", 16)
    methods = ["gaussian", "mixture-2-nce", "nce"]
    assert run(methods, 2, steps=2, results=tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(made) == 6
    assert run(methods, 2, steps=2, results=tmp_path)  # nothing is left to do
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    record = json.loads((tmp_path / "nce" / "0.json").read_text())
    assert record["steps"] == 2 and math.isfinite(record["hidden"]["nll"])
    text = report(tmp_path, tmp_path / "scenes.png")
    assert text in (tmp_path / "README.md").read_text() and "energy head, NCE" in text and "nan" not in text
    assert (tmp_path / "scenes.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="There are no results in"):
        report(tmp_path / "nowhere")
