"""Whether rows should share their samples: all rows use the samples of every row's proposal, with balanced weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import energyreg as er
from benchmarks.rows import Benchmark, Measurement, Options
from benchmarks.timing import paired
from energyreg.inference.energy import EnergyFunction
from energyreg.inference.integrators import ImportanceSampling
from energyreg.networks.heads import JointHead, SeparableHead

__all__ = ["BENCHMARKS"]


def own(f: EnergyFunction, samples: int, generator: torch.Generator) -> Tensor:
    """log Z of each row from samples of its own proposal, shape (B,)."""
    return ImportanceSampling(samples)(f, f.q, generator=generator).log_partition


def shared(f: EnergyFunction, samples: int, generator: torch.Generator) -> Tensor:
    """log Z of each row from the samples of all rows' proposals, as draws of the mean of those, shape (B,)."""
    rule = ImportanceSampling(samples)
    assert f.q is not None
    points = rule.sample(f.q, generator=generator).flatten(0, 1)[:, None]  # (M B, 1, D)
    log_q = f.q.log_prob(points)  # (M B, B)
    # f holds log q itself, as the proposal is its base: the density at all pairs is taken once.
    assert f.head is not None
    g = f.head(f.context, 2 * f.reference.to_unit(points) - 1)
    log_mean = log_q.logsumexp(1, keepdim=True) - math.log(f.batch_size)
    return (log_q + g - log_mean).logsumexp(0) - math.log(len(points))


def model(head: Callable[..., nn.Module], dim: int, rows: int) -> tuple[EnergyFunction, Any]:
    """The energy function of some rows of a model trained for a while on targets that move with x, D dimensions."""
    torch.manual_seed(0)
    x = torch.randn(2048, 4)
    y = x[:, :1] + torch.randn(2048, dim).mul(0.3).exp() * (torch.rand(2048, 1) - 0.5).sign()
    width, space = 64, er.spaces.Real(dim)
    result = er.EnergyRegressionModel(
        er.encoders.TableEncoder(4, width, dropout=0.0), head(width, dim, space.periodic),
        proposal=er.proposals.MixtureDensityNetwork(width, dim, 4, periodic=space.periodic),
        base=er.bases.ProposalBase(er.bases.Marginal(dim, space.periodic)), space=space,
    )  # fmt: skip
    er.fit(result, x, y, epochs=20, progress=False)
    with torch.no_grad():
        return result.energy(x[:rows]), result


def _measure(options: Options, head: Callable[..., nn.Module]) -> Measurement:
    dim, rows = 3, options.size(256, 128, 16)
    f, _ = model(head, dim, rows)
    generator = torch.Generator().manual_seed(0)
    candidates: dict[str, Callable[[], Tensor]] = {"own, M = 64": lambda: own(f, 64, generator)}
    for m in (1, 2, 4):
        candidates[f"shared, M = {m}"] = lambda m=m: shared(f, m, generator)  # type: ignore[misc]
    variances = {}
    with torch.no_grad():
        for name, estimate in candidates.items():
            variances[name] = torch.stack([estimate() for _ in range(options.size(100, 30, 3))]).var(0).mean()
        times = paired(candidates, options.rounds)
    # What counts is the variance times the time: half of either is as good as the other.
    work = {name: float(variance) * times.median(name) for name, variance in variances.items()}
    best = min((name for name in work if name.startswith("shared")), key=work.__getitem__)
    reference = "own, M = 64"
    return Measurement(
        work[best] / work[reference],
        seconds={name: times.median(name) for name in candidates},
        details={"best": best, "variance of log Z": {name: float(v) for name, v in variances.items()}},
    )


BENCHMARKS = [
    Benchmark(
        "shared-separable", "variance × time of log Z from samples that rows share, against own ones, D = 3, separable",
        "kept if < 1", lambda options: _measure(options, SeparableHead), 1.0, "lower", "{:.2f} ×", once=True,
    ),
    Benchmark(
        "shared-joint", "the same for a joint head", "kept if < 1",
        lambda options: _measure(options, JointHead), 1.0, "lower", "{:.2f} ×", once=True,
    ),
]  # fmt: skip
