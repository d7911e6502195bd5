"""Predictions of a trained model: log-densities, means and intervals of many rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

import energyreg as er
from benchmarks.rows import Benchmark, Measurement, Options
from benchmarks.steps import FEATURES, table
from benchmarks.timing import growth, paired

__all__ = ["BENCHMARKS", "trained"]


@cache
def trained(kind: str, rows: int, tiny: bool = False) -> tuple[er.EnergyRegressionModel, Tensor, Tensor]:
    """A model of the protein table after a few epochs, so that its densities are as uneven as real ones, and rows.

    Args:
        kind: "energy" or "mixture".
        rows: How many rows; those of the table over and over.
        tiny: Whether a small model of a made-up table will do.
    """
    if tiny:
        x, y = table(512)
    else:
        data = er.datasets.load_protein()
        x, y = (torch.as_tensor(part[data.train], dtype=torch.float32) for part in (data.x, data.y))
    torch.manual_seed(0)
    make = er.EnergyRegressionModel
    size = {"width": 16 if tiny else 256}
    model = make.for_table(FEATURES, **size) if kind == "energy" else make.mixture_for_table(FEATURES, **size)
    er.fit(model, x, y.reshape(len(x), -1), epochs=1 if tiny else 5, validation=None, progress=False)
    index = torch.arange(rows) % len(x)
    return model, x[index], y.reshape(len(x), -1)[index]


def log_prob(model: er.EnergyRegressionModel, x: Tensor, y: Tensor) -> object:
    """The log-densities at the targets."""
    return model(x).log_prob(y)


def mean_and_interval(model: er.EnergyRegressionModel, x: Tensor, y: Tensor) -> object:
    """Mean and interval of one predictive distribution, as a user asks for them."""
    p = model(x)
    return p.mean, p.interval(0.9)


Question = Callable[[er.EnergyRegressionModel, Tensor, Tensor], object]


def _rate(question: Question, options: Options) -> Measurement:
    rows, part = options.size(100_000, quick=20_000, tiny=64), options.size(10_000, tiny=64)

    def ask(kind: str, count: int) -> Callable[[], object]:
        model, x, y = trained(kind, rows, options.tiny)
        model, x, y = model.to(options.device), x[:count].to(options.device), y[:count].to(options.device)
        return lambda: question(model, x, y)

    rounds = max(options.rounds // 3, 2)
    times = paired({"all rows": ask("energy", rows)}, rounds, device=options.device, warm_up=1)
    # The same question to a mixture, of fewer rows: its intervals take several times as long.
    pair = paired({kind: ask(kind, part) for kind in ("energy", "mixture")}, rounds, device=options.device, warm_up=1)
    ratio = pair.ratio("energy", "mixture").median
    fastest, slowest = min(times.seconds["all rows"]), max(times.seconds["all rows"])
    return Measurement(
        rows / times.median("all rows"),
        (rows / slowest, rows / fastest),
        ratio,
        {"all rows": times.median("all rows"), **{f"{part} rows, {kind}": pair.median(kind) for kind in pair.seconds}},
        {"rows": rows, "against a mixture's": f"{ratio:.2f} × the time"},
    )


def _growth_of_rows(options: Options) -> Measurement:
    sizes = [16, 32, 64] if options.tiny else [12_500, 25_000, 50_000, 100_000]
    sizes = sizes[:3] if options.quick else sizes
    model, x, y = trained("energy", sizes[-1], options.tiny)
    model, x, y = model.to(options.device), x.to(options.device), y.to(options.device)
    actions = {str(size): partial(log_prob, model, x[:size], y[:size]) for size in sizes}
    times = paired(actions, max(options.rounds // 5, 2), device=options.device, warm_up=1)
    medians = {name: times.median(name) for name in actions}
    return Measurement(growth(sizes, list(medians.values())), seconds=medians, details={"sizes": sizes})


@cache
def sharp(tiny: bool = False) -> tuple[er.EnergyRegressor, Tensor, Tensor]:
    """A default ensemble of a made table whose targets vary by a thousandth of their range around a curve, and rows."""
    rows = 256 if tiny else 2000
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, 6, generator=generator) * 2 - 1
    y = (3 * x[:, 0]).sin() + x[:, 1] / 2 + 3e-3 * torch.randn(rows, generator=generator)
    settings = {"n_members": 2, "epochs": 1, "width": 16} if tiny else {"n_members": 5, "epochs": 60, "width": 128}
    return er.EnergyRegressor(random_state=0, **settings).fit(x.numpy(), y.numpy()), x, y.double()


def _rate_of_sharp(options: Options) -> Measurement:
    regressor, x, y = sharp(options.tiny)
    rows = min(options.size(2000, quick=500, tiny=64), len(x))

    def ask() -> object:
        p = regressor.predict_distribution(x[:rows].numpy())
        return p.mean, p.interval(0.9), p.log_prob(y[:rows])

    times = paired({"all rows": ask}, max(options.rounds // 5, 2), device=options.device, warm_up=1)
    rate = rows / times.median("all rows")
    return Measurement(rate, seconds={"all rows": times.median("all rows")}, details={"rows": rows})


BENCHMARKS = [
    Benchmark(
        "predict-log-prob", "`log_prob`, D = 1, 100,000 rows, defaults", "≥ 50,000 rows/s", partial(_rate, log_prob),
        50_000, "higher", "{:,.0f} rows/s", guarded="ratio",
    ),
    Benchmark(
        "predict-interval", "mean and 90 % interval, D = 1, 100,000 rows, defaults", "≥ 20,000 rows/s",
        partial(_rate, mean_and_interval), 20_000, "higher", "{:,.0f} rows/s", guarded="ratio",
    ),
    Benchmark(
        "predict-sharp", "mean, 90 % interval and `log_prob` of five members, σ a thousandth of the range",
        "≥ 10,000 rows/s", _rate_of_sharp, 10_000, "higher", "{:,.0f} rows/s",
    ),
    Benchmark(
        "growth-rows", "exponent of the time of `log_prob` in the rows", "≤ 1.1", _growth_of_rows, 1.1, "lower",
        "{:.2f}",
    ),
]  # fmt: skip
