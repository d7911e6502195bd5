"""Whole trainings: toy 1 to a divergence from the truth, and the protein table to its best validation NLL."""

from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import energyreg as er
from benchmarks import plain
from benchmarks.rows import Benchmark, Measurement, Options
from energyreg.densities.noise import GaussianNoise
from experiments.one_dimensional.evaluation import cached_task
from experiments.one_dimensional.settings import SETTINGS
from experiments.one_dimensional.tasks import Task
from experiments.one_dimensional.training import Papers

__all__ = ["BENCHMARKS", "Stopwatch"]

KL = 0.05
"""Divergence from the truth, in nats, that a training is timed to."""

PAPERS = "toy1-nceplus"


class Stopwatch:
    """Seconds that run only between `start` and `stop`."""

    def __init__(self) -> None:
        self.seconds, self.started = 0.0, math.nan

    def start(self) -> None:
        """Go on."""
        self.started = time.perf_counter()

    def stop(self) -> float:
        """Stop, and return the seconds so far."""
        self.seconds += time.perf_counter() - self.started
        return self.seconds


def _divergence(task: Task, density: Any) -> float:
    """D_KL from the truth on the task's grid, as `experiments` evaluates it."""
    y = task.y_grid.float()
    with torch.no_grad():
        values = torch.cat([density(x, y) for x in task.x_grid.float().split(64)], -1)
    return float(task.kl_divergence(values))


def _of_model(model: er.EnergyRegressionModel, x: Tensor, y: Tensor) -> Tensor:
    """Unnormalised log-density on a grid, (Y, X)."""
    z = model.space.to_model(y[:, None].double()).to(model.dtype)
    return model.energy(x)(z[:, None])


def library(task: Task, seed: int, epochs: int) -> list[tuple[float, float]]:
    """Train by `er.fit` with its defaults; seconds and divergence after each epoch, without the time to measure it.

    `fit` puts the model into training mode where an epoch begins and into evaluation mode where its steps are done:
    there the watch stops while the weights of that moment are judged.
    """
    torch.manual_seed(seed)
    watch, curve = Stopwatch(), []
    watch.start()
    model = er.EnergyRegressionModel.for_table(num_features=1)
    switch = model.train

    def train(mode: bool = True) -> er.EnergyRegressionModel:
        epoch_is_done = model.training and not mode
        switch(mode)
        if epoch_is_done and len(curve) < epochs and bool(model.fitted):
            seconds = watch.stop()
            curve.append((seconds, _divergence(task, lambda x, y: _of_model(model, x, y))))
            watch.start()
        return model

    model.train = train  # type: ignore[method-assign]
    model.eval()
    er.fit(model, *task.train, epochs=epochs, seed=seed, progress=False)
    return curve


def papers(task: Task, seed: int, setting: Papers, epochs: int, samples: int, every: int) -> list[tuple[float, float]]:
    """Train with the settings of the papers, in the plain formulation; the same curve."""
    torch.manual_seed(seed)
    objective = setting.objective(samples)
    noise = objective.noise
    assert isinstance(noise, GaussianNoise)
    scales = torch.tensor(noise.scales)
    network = plain.ToyNetwork()
    optimiser = torch.optim.Adam(network.parameters(), lr=setting.learning_rate)
    watch, curve = Stopwatch(), []
    x_all, y_all = task.train
    for epoch in range(epochs):
        watch.start()
        for rows in torch.randperm(len(x_all)).split(setting.batch):
            x, y = x_all[rows], y_all[rows]
            points, density, _ = plain.sample_noise(y, scales, samples)
            # NCE+: the positive is a point near the target, with its density under the unscaled noise.
            near, _, _ = plain.sample_noise(y, objective.beta * scales, 1)
            points = torch.cat((near[:, 1:], points[:, 1:]), dim=1)
            density_near = plain.gaussian_mixture(near[:, 1:] - near[:, :1], scales)
            loss = plain.nce_loss(network(x, points[..., 0]), density, density_near).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        seconds = watch.stop()
        if (epoch + 1) % every == 0 or epoch + 1 == epochs:
            curve.append((seconds, _divergence(task, lambda x, y: network(x, y.expand(len(x), -1)).T)))
    return curve


def reached(curve: list[tuple[float, float]]) -> float | None:
    """Seconds until the divergence is small enough; None if it never is."""
    return next((seconds for seconds, kl in curve if kl <= KL), None)


def _say(line: str) -> None:
    """Progress, for rows that take long."""
    print(f"  {line}", file=sys.stderr, flush=True)


def _toy(options: Options) -> Measurement:
    task = cached_task("toy1")
    library(task, 0, 1)  # the first training of a process pays for imports
    setting = next(setting for setting in SETTINGS if setting.name == PAPERS)
    assert isinstance(setting, Papers)
    seeds = options.size(5, quick=1)
    ours, theirs = [], []
    for seed in range(seeds):
        ours.append(library(task, seed, options.size(100, tiny=1)))
        epochs, samples = options.size(setting.epochs, quick=3, tiny=1), options.size(setting.samples, tiny=4)
        theirs.append(papers(task, seed, setting, epochs, samples, every=5))
        _say(
            f"seed {seed}: library {reached(ours[-1])}, papers {reached(theirs[-1]) or 'never'} seconds, "
            f"divergence at the end {ours[-1][-1][1]:.3f} and {theirs[-1][-1][1]:.3f}"
        )
    fast = [reached(curve) for curve in ours]
    # A training that never gets there took at least as long as all of it.
    slow = [reached(curve) or curve[-1][0] for curve in theirs]
    details: dict[str, Any] = {
        "library's seconds": [None if s is None else round(s, 2) for s in fast],
        "library's seconds in all": [round(curve[-1][0], 2) for curve in ours],
        "library's divergence at the end": [round(curve[-1][1], 4) for curve in ours],
        "papers' seconds": [round(s, 1) for s in slow],
        "papers reached it": [reached(curve) is not None for curve in theirs],
        "papers' divergence at the end": [round(curve[-1][1], 4) for curve in theirs],
        "papers' lowest divergence": [round(min(kl for _, kl in curve), 4) for curve in theirs],
    }
    details |= _ensemble(task, seeds, options)
    there = [s for s in fast if s is not None]
    everywhere = len(there) == len(fast)
    # Seeds that never got there count as all of their time, and the target is missed.
    ratios = [b / (a or curve[-1][0]) for a, b, curve in zip(fast, slow, ours, strict=True)]
    value = statistics.median(ratios)
    return Measurement(
        value, (min(ratios), max(ratios)), details=details, met=everywhere and min(ratios) >= 20,
        seconds={"library": statistics.median(there) if there else math.nan, "papers": statistics.median(slow)},
    )  # fmt: skip


def _ensemble(task: Task, members: int, options: Options) -> dict[str, Any]:
    """The same members in one pass: the time of the whole training, and the divergences at its end."""
    if options.tiny:
        return {}
    watch = Stopwatch()
    watch.start()
    ensemble = er.fit_ensemble(
        lambda: er.EnergyRegressionModel.for_table(num_features=1), *task.train, n_members=members, progress=False
    )
    seconds = watch.stop()
    each = [_divergence(task, partial(_of_model, model)) for model in ensemble.members]

    def mixture(x: Tensor, y: Tensor) -> Tensor:
        parts = [_of_model(model, x, y).log_softmax(0) for model in ensemble.members]
        return torch.stack(parts).logsumexp(0)

    return {
        "members": members,
        "ensemble's seconds in all": round(seconds, 2),
        "members' divergence": [round(kl, 4) for kl in each],
        "ensemble's divergence": round(_divergence(task, mixture), 4),
    }


# Protein --------------------------------------------------------------------------------------------------------------


def _protein(options: Options) -> Measurement:
    from energyreg.cli.demo import FULL, Setting, load, train

    narrow, wide = FULL
    if options.quick or options.tiny:
        rows = options.size(0, quick=4096, tiny=512)
        narrow, wide = (replace(setting, epochs=2, max_rows=rows) for setting in FULL)
    data = load(narrow)
    make = er.EnergyRegressionModel
    columns = data.x.shape[1]
    models: dict[str, tuple[Any, Setting]] = {
        f"mixture K = {k}, width {setting.width}": (
            lambda k=k, s=setting: make.mixture_for_table(columns, num_components=k, width=s.width, dropout=s.dropout),
            setting,
        )
        for setting in (narrow, wide) for k in (8, 30)
    }  # fmt: skip
    models["energy"] = (lambda: make.for_table(columns, width=narrow.width, dropout=narrow.dropout), narrow)
    results = {}
    for name, (build, setting) in models.items():
        torch.manual_seed(0)
        model = build().to(options.device)
        history = train(model, data, setting, seed=0)
        _say(f"{name}: {history}")
        test = -model(data.x[data.test]).log_prob(data.y[data.test]).double().mean()
        results[name] = {
            "seconds": sum(history.seconds[: history.best_epoch]),
            "best epoch": history.best_epoch,
            "seconds an epoch": statistics.median(history.seconds),
            "validation NLL": history.best_validation_nll,
            "test NLL": float(test),
        }
    energy = results.pop("energy")
    same = results[f"mixture K = 8, width {narrow.width}"]
    best = min(result["test NLL"] for result in results.values())
    ratio = energy["seconds"] / same["seconds"]
    seconds = {"energy": energy["seconds"], **{name: result["seconds"] for name, result in results.items()}}
    return Measurement(
        ratio, seconds=seconds, met=ratio <= 2.5 and energy["test NLL"] < best,
        details={"test NLL": {name: round(r["test NLL"], 4) for name, r in {"energy": energy, **results}.items()},
                 "validation NLL": {n: round(r["validation NLL"], 4) for n, r in {"energy": energy, **results}.items()},
                 "best epoch": {name: r["best epoch"] for name, r in {"energy": energy, **results}.items()},
                 "ratio of an epoch": round(energy["seconds an epoch"] / same["seconds an epoch"], 3)},
    )  # fmt: skip


BENCHMARKS = [
    Benchmark(
        "toy1", "toy 1 to a divergence of 0.05, all of 5 seeds, `er.fit` against the papers' NCE+ in plain form",
        "≥ 20 × faster, every seed", _toy, 20, "higher", "{:.0f} ×", once=True, long=True,
    ),
    Benchmark(
        "protein", "protein table to the best validation NLL, default model against mixtures of the same encoder",
        "≤ 2.5 × the time, and a better test NLL than all of them", _protein, 2.5, once=True, long=True, asked=True,
    ),
]  # fmt: skip
