"""Train every method on every task, judge it on the same test rows, and write a JSON file for each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import energyreg as er
from energyreg.cli.demo import describe_machine
from energyreg.densities.bases import Marginal, ProposalBase
from energyreg.densities.spaces import Real
from energyreg.evaluation import metrics
from energyreg.files import write_atomically
from energyreg.networks.proposals import MixtureDensityNetwork
from experiments.several_outputs.tasks import TASKS, Task

__all__ = ["METHODS", "RESULTS", "run"]

RESULTS = Path(__file__).parent / "results"
WIDTH, STEPS = 128, 600
"""Width of the encoders, and steps of a training: fewer than `EnergyRegressor` takes, as the joint model is slow."""
DRAWS, SCORED_ROWS = 64, 200
"""Draws of the energy score and of the mean, and test rows that are judged by them, evenly spaced."""

ONE_SEED = ("joint, full proposal", "chain, reversed")
"""Variants that are trained once."""

Build = Callable[[int, int], torch.nn.Module]


def joint(features: int, rows: int) -> er.EnergyRegressionModel:
    """The default for several outputs: a joint head on a mixture of diagonal Gaussians, by NCE."""
    return er.EnergyRegressionModel.for_table(features, Real(3), width=WIDTH, num_rows=rows)


def joint_full(features: int, rows: int) -> er.EnergyRegressionModel:
    """The same on a mixture of full covariance."""
    model = joint(features, rows)
    proposal = MixtureDensityNetwork(WIDTH, 3, rank=2)
    return er.EnergyRegressionModel(
        model.encoder, model.head, proposal=proposal, base=ProposalBase(Marginal(3)), space=Real(3)
    )


def mixture_full(features: int, rows: int) -> er.EnergyRegressionModel:
    """A mixture of eight Gaussians of full covariance (a factor of rank two and a diagonal)."""
    return joint_full(features, rows).proposal_model()


def chain(features: int, rows: int) -> er.EnergyChain:
    """A chain in the order of the columns."""
    return er.EnergyChain.for_table(features, Real(3), width=WIDTH, num_rows=rows)


def chain_reversed(features: int, rows: int) -> er.EnergyChain:
    """A chain in the opposite order."""
    return er.EnergyChain.for_table(features, Real(3), order=[2, 1, 0], width=WIDTH, num_rows=rows)


METHODS: dict[str, Build] = {
    "chain": chain,
    "mixture, full": mixture_full,
    "joint": joint,
    "chain, reversed": chain_reversed,
    "joint, full proposal": joint_full,
}


def train(build: Build, task: Task, seed: int) -> torch.nn.Module:
    """The trained model, with the weights of the epoch that is best on the validation rows."""
    x, y = task.train
    batch = 256 if len(y) >= 6_400 else max(2 ** int(np.log2(len(y) / 25)), 32)
    epochs = min(max(round(STEPS / (len(y) // batch)), 20), 60)
    settings: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch, "validation": task.validation, "seed": seed, "progress": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = build(x.shape[1], len(y))
    if isinstance(model, er.EnergyChain):
        return er.fit_chain(lambda: build(x.shape[1], len(y)), x, y, **settings)
    er.fit(model, x, y, **settings)
    return model


def standard_error(values: np.ndarray, groups: np.ndarray) -> float:
    """Standard error of the mean of values, of which those of a group belong together."""
    sums = np.bincount(groups, values - values.mean())
    count = len(sums)
    return float(np.sqrt(np.square(sums).sum() * count / (count - 1)) / len(values))


def judge(model: torch.nn.Module, task: Task, seed: int) -> dict[str, float]:
    """Scores on the test rows."""
    x, y = task.test
    started = time.process_time()
    p = model(x)
    log_prob = p.log_prob(y).double()
    density_seconds = time.process_time() - started
    scores = {"seconds_density": density_seconds}
    scores |= {"nll": float(-log_prob.mean()), "nll_se": standard_error(log_prob.numpy(), task.groups)}
    if task.log_prob is not None:
        gap = task.log_prob(x, y) - log_prob
        scores |= {"kl": float(gap.mean()), "kl_se": standard_error(gap.numpy(), task.groups)}
    started = time.process_time()
    few = torch.linspace(0, len(y) - 1, SCORED_ROWS).long()
    p, y = model(x[few]), y[few]
    draws = p.sample((DRAWS,), generator=torch.Generator().manual_seed(seed))
    scores["seconds_draws"] = time.process_time() - started
    scores["energy_score"] = metrics.energy_score(p, y, num_samples=DRAWS, seed=seed)
    scores["mean_error"] = float((draws.mean(0) - y).abs().mean())
    return scores


def run(names: list[str], seeds: int, data: Path | None, results: Path = RESULTS) -> bool:
    """Do what has no result yet.

    Args:
        names: Tasks.
        seeds: How many trainings of each method.
        data: Folder of the head poses; without it that task is left out.
        results: Where the results go.

    Returns:
        Whether everything that was asked for is there.
    """
    chosen: dict[str, Task] = {}
    for name in names:
        if name == "head pose" and data is None:
            print("head pose is left out: pass --data FOLDER")
        else:
            chosen[name] = TASKS[name](data or Path())
    for main in (True, False):  # the variants last
        for seed in range(seeds if main else 1):
            for name, task in chosen.items():
                for method in METHODS:
                    if (method not in ONE_SEED) is main:
                        _run_one(name, task, method, seed, results)
    return len(chosen) == len(names)


def _run_one(name: str, task: Task, method: str, seed: int, results: Path) -> None:
    path = results / f"{name} - {method} - {seed}.json".replace(" ", "_").replace(",", "")
    if path.exists():
        return
    started = time.process_time()
    model = train(METHODS[method], task, seed)
    fit_seconds = time.process_time() - started
    record = {
        "task": name, "method": method, "seed": seed, "rows": len(task.train[1]), "test_rows": len(task.test[1]),
        "parameters": sum(p.numel() for p in model.parameters()), "seconds_fit": fit_seconds,
        **judge(model.eval(), task, seed), "torch": torch.__version__, "processor": describe_machine()["processor"],
    }  # fmt: skip
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    print(f"{path.stem}: NLL {record['nll']:.3f}, {fit_seconds:.0f} s", flush=True)
