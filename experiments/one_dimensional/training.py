"""The two ways to train: many seeds at once as in the papers, and one seed through the library's front door."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

import energyreg as er
from energyreg.objectives import Loss, NonFiniteLossError
from experiments.one_dimensional.evaluation import Density, Score, cached_task, evaluate
from experiments.one_dimensional.networks import Model
from experiments.one_dimensional.tasks import Task

__all__ = ["Library", "Papers", "Result", "Setting", "train"]


@dataclass(frozen=True)
class Result:
    """What came of a block of seeds.

    Attributes:
        model: Score of the model itself.
        proposal: Score of its proposal, where there are both.
        train_loss: Mean training loss of the last epoch, one a seed.
        diverged: Whether a loss was not finite, one a seed.
        notes: Anything else, for the record.
    """

    model: Score
    proposal: Score | None
    train_loss: list[float]
    diverged: list[bool]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """An entry of the list of experiments.

    Attributes:
        name: Name of its folder of results.
        task: Name of its task.
        method: Its row in the tables.
        samples: Samples M per example; 0 where there are none.
        seeds: Number of seeds, 0 to seeds - 1.
        block: Seeds in one piece of work.
        seconds: Rough duration of a block, by which work is ordered.
    """

    name: str
    task: str
    method: str
    samples: int
    seeds: int
    block: int
    seconds: float

    def run(self, seeds: Sequence[int]) -> Result:
        """Train and judge a block of seeds."""
        raise NotImplementedError


@dataclass(frozen=True)
class Papers(Setting):
    """Training as in the papers: small networks, Adam with a constant step, the last epoch's weights.

    Attributes:
        network: Generators, one a seed, to the model of all of them.
        objective: Makes the objective from M.
        epochs, batch, learning_rate: As in the papers.
        judge_proposal: Whether the model to judge is the proposal, as with the EBM as a teacher.
    """

    network: Callable[[Sequence[Generator]], Model]
    objective: Callable[[int], Callable[..., Loss]]
    epochs: int = 75
    batch: int = 32
    learning_rate: float = 1e-3
    judge_proposal: bool = False

    def run(self, seeds: Sequence[int]) -> Result:
        """Train and judge a block of seeds."""
        task = cached_task(self.task)
        model, losses, diverged = train(self, task, seeds)
        model.eval()

        def density(part: int) -> Density:
            def values(x: Tensor, y: Tensor) -> Tensor:
                s = len(seeds)
                distribution = model(x[:, 0].expand(s, -1))[part]
                rows = y[:, None].expand(-1, s, -1, 1).flatten(1, 2)
                log_values = distribution.log_prob(rows) if part else distribution(rows)
                return log_values.unflatten(1, (s, -1)).movedim(1, 0)

            return values

        scores = [
            evaluate(task, density(part), normalised=bool(part))
            for part, there in enumerate([model.energy, model.proposal])
            if there is not None and not (self.judge_proposal and part == 0)
        ]
        return Result(scores[0], scores[1] if len(scores) > 1 else None, losses, diverged)


def train(setting: Papers, task: Task, seeds: Sequence[int]) -> tuple[Model, list[float], list[bool]]:
    """Train a block of seeds at once.

    A seed's initialisation and order of batches are its own whatever block it is in; the objective's samples come from
    one generator for the block.

    Returns:
        The model, and for each seed the mean loss of the last epoch and whether a loss was not finite.
    """
    generators = [Generator().manual_seed(seed) for seed in seeds]
    sampling = Generator().manual_seed(10_000 + seeds[0])
    model, objective = setting.network(generators), setting.objective(setting.samples)
    optimiser = torch.optim.Adam(model.parameters(), lr=setting.learning_rate, fused=True)
    (x, y), s = task.train, len(seeds)
    finite = torch.ones(s, dtype=torch.bool)
    total = torch.full((s,), math.nan)
    for _ in range(setting.epochs):
        order = torch.stack([torch.randperm(len(x), generator=g) for g in generators])
        total = torch.zeros(s)
        for rows in order.split(setting.batch, 1):
            f, q = model(x[rows, 0])
            try:
                loss = objective(f, q, y[rows].flatten(0, 1), generator=sampling)
            except NonFiniteLossError as error:  # of one seed; the others go on
                loss = error.loss
            loss = loss.per_example.reshape(s, -1).mean(1)
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
            total += loss.detach() * rows.shape[1]
        finite &= total.isfinite()
        if not finite.any():
            break
    return model, (total / len(x)).tolist(), (~finite).tolist()


@dataclass(frozen=True)
class Library(Setting):
    """Training by `energyreg.fit`, seed by seed; of several models the one with the best validation NLL is kept.

    Attributes:
        models: Each makes an untrained model.
        fit: Arguments of `fit`.
    """

    models: dict[str, Callable[[], er.EnergyRegressionModel]]
    fit: dict[str, Any] = field(default_factory=dict)

    def run(self, seeds: Sequence[int]) -> Result:
        """Train and judge some seeds, one after the other."""
        task = cached_task(self.task)
        validation = {} if task.validation is None else {"validation": task.validation}
        scores, losses, chosen, validation_nll, members = [], [], [], [], []
        for seed in seeds:
            trained = {}
            for name, build in self.models.items():
                torch.manual_seed(seed)
                model = build()
                history = er.fit(model, *task.train, seed=seed, progress=False, **{**validation, **self.fit})
                trained[name] = history, model
            best = min(trained, key=lambda name: trained[name][0].best_validation_nll)
            history, model = trained[best]
            members.append(partial(_library_density, model))
            scores.append(evaluate(task, members[-1], normalised=True))
            losses.append(history.train_loss[-1])
            chosen.append(best)
            validation_nll.append(history.best_validation_nll)
        notes: dict[str, Any] = {"chosen": chosen, "validation_nll": validation_nll}
        if len(seeds) > 1:
            # The mixture of the seeds' densities, as an ensemble predicts.
            together = evaluate(task, partial(_mean_density, members), normalised=True)
            notes |= {"ensemble_kl": together.kl[0]}
            notes |= {} if together.test_nll is None else {"ensemble_test_nll": together.test_nll[0]}
        score = Score(
            [s.kl[0] for s in scores], None if task.test is None else [s.test_nll[0] for s in scores], scores[0].picture
        )
        return Result(score, None, losses, [not math.isfinite(loss) for loss in losses], notes)


def _library_density(model: er.EnergyRegressionModel, x: Tensor, y: Tensor) -> Tensor:
    """Log-density of a model, shape (1, M, X); on a grid of y normalised over that grid, which is many times faster."""
    if len(y) == 1:
        return model(x).log_prob(y[0])[None, None].float()
    z = model.space.to_model(y[:, :1].double()).to(model.dtype)
    return model.energy(x)(z).log_softmax(0)[None]


def _mean_density(members: Sequence[Density], x: Tensor, y: Tensor) -> Tensor:
    """Log of the mean of several densities, shape (1, M, X)."""
    return torch.stack([member(x, y) for member in members]).logsumexp(0) - math.log(len(members))
