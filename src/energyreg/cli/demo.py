"""The whole job on real data: train three kinds of density on the protein table, score them, and write a page about it.

    python -m energyreg.demo --output demo          # the page, in under three minutes on two cores
    python -m energyreg.demo --output full --full   # the larger models, several seeds: the README's table

Both write `results.json`; the first also writes `report.html`, which needs no network to be read.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import energyreg as er
from energyreg.cli.console import INTERRUPTED, check_writable, print_table, stop
from energyreg.datasets import Protein, load_protein
from energyreg.files import write_atomically
from energyreg.reports.page import Example, ModelResult, Partition, Report, Score

__all__ = ["FULL", "QUICK", "Setting", "run"]

GAUSSIAN, MIXTURE, ENERGY = "Gaussian network", "Mixture density network", "Energy-based model"
TARGET = "RMSD (Å)"
LEVEL = 0.9


@dataclass(frozen=True)
class Setting:
    """Sizes and budget, the same for every model of a run.

    Args:
        width: Width of the encoder.
        dropout: Dropout of the encoder.
        num_components: Gaussians of the mixture density network.
        epochs: Passes over the training rows.
        learning_rate: Peak of the one-cycle schedule.
        max_rows: Use only the first so many training, validation and test rows each. All by default.
    """

    width: int = 256
    dropout: float = 0.2
    num_components: int = 20
    epochs: int = 25
    learning_rate: float = 5e-3
    max_rows: int | None = None


QUICK = Setting()
FULL = (
    Setting(width=256, dropout=0.25, num_components=8, learning_rate=3e-3, epochs=40),
    Setting(width=384, dropout=0.3, num_components=30, learning_rate=3e-3, epochs=40),
)


# The three functions below are shown in the report.
def build_models(num_features: int, setting: Setting) -> dict[str, er.EnergyRegressionModel]:
    """Three kinds of density on top of the same encoder."""
    real = er.spaces.Real(1)
    size: dict[str, Any] = {"width": setting.width, "dropout": setting.dropout}
    make = er.EnergyRegressionModel
    return {
        GAUSSIAN: make.mixture_for_table(num_features, real, num_components=1, **size),
        MIXTURE: make.mixture_for_table(num_features, real, num_components=setting.num_components, **size),
        ENERGY: make.for_table(num_features, real, **size),
    }


def train(model: er.EnergyRegressionModel, data: Protein, setting: Setting, seed: int) -> er.History:
    """Fit a model, and keep the weights of its best epoch on the validation rows."""
    x, y, held_out = data.x, data.y, data.validation
    validation = (x[held_out], y[held_out])
    budget: dict[str, Any] = {"epochs": setting.epochs, "learning_rate": setting.learning_rate}
    return er.fit(model, x[data.train], y[data.train], validation=validation, seed=seed, **budget)


def score(model: er.EnergyRegressionModel, data: Protein) -> dict[str, float]:
    """Score the predicted densities of the test rows."""
    p = model(data.x[data.test])  # a torch distribution: log_prob, sample, mean, cdf, interval ...
    return er.metrics.evaluate(p, data.y[data.test], level=LEVEL)


SHOWN: tuple[Callable[..., Any], ...] = (build_models, train, score)

SCORES = (
    Score(
        "nll", "Test NLL (nats)",
        "Mean of −log p at the observed values. Lower is better. It tells densities apart best: 0.1 less means that "
        "the density at the observed value is typically e^0.1 = 1.11 times as high.",
    ),
    Score(
        "crps", "CRPS (Å)",
        "How far the predicted distribution lies from the observed value, on average. Lower is better. For a "
        "forecast without any spread it is the absolute error.",
    ),
    Score(
        "coverage", "90% coverage",
        "Fraction of observed values inside the predicted 90% intervals. Best at 90%: less means overconfident, more "
        "means vague.", LEVEL, ".1%",
    ),
    Score(
        "interval_width", "90% width (Å)",
        "Mean width of those intervals. Narrower is better among models that keep their coverage. An interval must "
        "bridge the gap between two modes, so it hides what a model knows about them.", format=".2f",
    ),
    Score("train_seconds", "Training (s)", "Wall-clock time, with the validation after each epoch.", format=".1f"),
    Score(
        "rows_per_second", "Predictions (rows/s)", "Test rows per second, from raw inputs to normalised log p(y|x).",
        math.inf, ",.0f",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A trained model, its scores on the test rows, and log p of each of them."""

    model: er.EnergyRegressionModel
    history: er.History
    scores: dict[str, float]
    log_prob: Tensor

    def as_json(self) -> dict[str, Any]:
        """The numbers of the run, for `results.json`."""
        history = {name: [float(v) for v in getattr(self.history, name)] for name in ("train_loss", "validation_nll")}
        return {
            "scores": self.scores,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "best_epoch": self.history.best_epoch,
            "history": history,
        }


def run_model(model: er.EnergyRegressionModel, data: Protein, setting: Setting, seed: int) -> Run:
    """Train, time and score one model."""
    history = train(model, data, setting, seed)
    if history.interrupted:
        raise KeyboardInterrupt  # fit keeps the best weights so far, but half a comparison would be none
    x, y = data.x[data.test], data.y[data.test]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        log_prob = model(x).log_prob(y)
        times.append(time.perf_counter() - start)
    # The epochs alone: the first fit of a process also pays for imports.
    scores = score(model, data) | {"train_seconds": sum(history.seconds), "rows_per_second": len(x) / min(times)}
    return Run(model, history, scores, log_prob)


def run_quick(setting: Setting, seed: int, output: Path) -> None:
    """Train the three models, print their scores, and write the results and the report."""
    start = time.perf_counter()
    data = load(setting)
    runs = {}
    for number, name in enumerate((GAUSSIAN, MIXTURE, ENERGY), 1):
        print(f"[{number}/3] {name}", flush=True)
        torch.manual_seed(seed)
        runs[name] = run_model(build_models(data.x.shape[1], setting)[name], data, setting, seed)
    print_scores({name: run.scores for name, run in runs.items()})
    results = {
        "command": "python -m energyreg.demo",
        "seed": seed,
        "setting": asdict(setting),
        "data": describe_data(data),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "models": {name: run.as_json() for name, run in runs.items()},
        "nll_difference": {name: paired(runs[name].log_prob, runs[ENERGY].log_prob) for name in (GAUSSIAN, MIXTURE)},
        "seconds": time.perf_counter() - start,
    }
    save_json(output / "results.json", results)
    page = er.report.write(make_report(runs, data, results), output / "report.html")
    seconds = time.perf_counter() - start
    print(f"\nWrote {page} and {output / 'results.json'} in {seconds:.0f} s. Open the page in a browser.")


def paired(other: Tensor, energy: Tensor) -> dict[str, float]:
    """Lead of the energy-based model in log p of the observed values, in nats: mean over the rows, and its s.e."""
    gain = (energy - other).double()
    return {"mean": float(gain.mean()), "stderr": float(gain.std() / math.sqrt(len(gain)))}


def make_report(runs: Mapping[str, Run], data: Protein, results: Mapping[str, Any]) -> Report:
    """Gather what the page shows."""
    x, y = data.x[data.test], data.y[data.test]
    energy = runs[ENERGY].model(x)
    rows, examples = choose_examples(energy, y)
    descriptions = {
        GAUSSIAN: "one bell curve for each input",
        MIXTURE: f"a sum of {results['setting']['num_components']} bell curves for each input",
        ENERGY: "any shape: a learned function f(x, y), normalised",
    }
    return Report(
        title="How wrong is a predicted protein? Three networks answer with a density",
        summary=summarise(runs, data, results),
        models=[
            ModelResult(
                name=name,
                description=descriptions[name],
                scores=run.scores,
                pit=er.metrics.pit(run.model(x), y),
                history=run.history,
                examples=run.model(x[rows]),
            )
            for name, run in runs.items()
        ],
        scores=SCORES,
        examples=examples,
        choice="The rows were chosen by rule, from what the energy-based model predicts for all test rows.",
        target=TARGET,
        level=LEVEL,
        code="\n\n".join(inspect.getsource(function).rstrip() + "\n" for function in SHOWN),
        partition=check_partition(runs, x),
        setup=describe_setup(results),
        footer=(
            f"Data: {data.citation} Licence: {data.licence}",
            "Made by energyreg: energy-based regression in PyTorch.",
        ),
    )


def check_partition(runs: Mapping[str, Run], x: NDArray[np.float64]) -> Partition:
    """log Z of test rows by quadrature, and again by importance sampling from the mixture density network.

    The two know nothing of each other: the mixture is a model of its own, trained beside the energy.
    """
    energy, mixture = runs[ENERGY].model, runs[MIXTURE].model
    x = x[:: max(1, len(x) // 400)]
    sampler = er.integrators.ImportanceSampling(num_samples=1024)
    with torch.no_grad():
        # Both models standardise y by the same training rows, so that they share one model space.
        q = mixture.energy(mixture.check_inputs(x)).q
        generator = torch.Generator().manual_seed(0)
        points = sampler(energy.energy(energy.check_inputs(x)), q, generator=generator)
    return Partition(ENERGY, energy(x).diagnostics, points, sampler.num_samples, in_text(MIXTURE))


def summarise(runs: Mapping[str, Run], data: Protein, results: Mapping[str, Any]) -> list[str]:
    """The question and the answer, from the numbers of this run."""
    nll = {name: run.scores["nll"] for name, run in runs.items()}
    order = sorted(nll, key=lambda name: nll[name])
    listed = ", ".join(f"{nll[name]:.3f} for the {in_text(name)}" for name in order)
    question = (
        "A computed shape of a protein is off by some distance, the RMSD in ångström. From nine properties of the "
        "shape, three networks with the same encoder predict this distance for shapes they have never seen, each as a "
        "full predictive distribution. Many inputs fit a good shape and a bad one alike, and then the density has two "
        "modes."
    )
    if order[0] != ENERGY:
        best = f"In this run the {in_text(order[0])} is best: a mean −log p of {listed} (nats, lower is better)."
        return [question, best]
    gains = " and ".join(
        f"{gain['mean']:.3f} ± {gain['stderr']:.3f} nats over the {in_text(name)}"
        for name, gain in results["nll_difference"].items()
    )
    answer = (
        f"The energy-based model predicts best. On {len(data.test):,} test rows its mean −log p is the lowest: "
        f"{listed} (nats, lower is better). Its lead, row by row: {gains} (± one standard error)."
    )
    return [question, answer]


def in_text(name: str) -> str:
    """A model's name in the middle of a sentence: energy-based model, but Gaussian network."""
    return name if name == GAUSSIAN else name[0].lower() + name[1:]


def choose_examples(p: er.PredictiveDistribution, y: NDArray[np.float64]) -> tuple[list[int], list[Example]]:
    """Choose rows by rule: three with two modes, a certain one, an uncertain one, and the most surprising one.

    Args:
        p: What the energy-based model predicts for the test rows.
        y: Their observed targets, shape (B, 1).

    Returns:
        Row numbers, and for each what the page says about it.
    """
    intervals = p.highest_density_region(LEVEL).intervals
    assert intervals is not None
    chosen: dict[int, Example] = {}

    def choose(row: int, title: str, note: str) -> None:
        chosen.setdefault(row, Example(title, note, float(y[row, 0])))

    pairs = two_modes(p, intervals)
    titles = {0.5: "Two modes, equally likely", 0.35: "Two modes, one favoured", 0.2: "One likely, one not ruled out"}
    for fraction, title in titles.items():
        if left := [row for row in pairs if row not in chosen]:
            row = min(left, key=lambda r: pairs[r].unlike(fraction))
            pair = pairs[row]
            note = f"{pair.low:.0%} and {pair.high:.0%} of the probability, in two regions {pair.gap:.1f} Å apart."
            choose(row, title, note)
    order = np.argsort([float(interval.diff(dim=1).sum()) for interval in intervals])
    percent = len(order) // 100
    choose(int(order[percent]), "Certain", "99% of the rows have a longer 90% region.")
    choose(int(order[-1 - percent]), "Uncertain", "99% of the rows have a shorter 90% region.")
    worst = "Of all test rows, the energy-based model does worst on this one."
    choose(int(p.log_prob(y).argmin()), "Most surprising", worst)
    return list(chosen), list(chosen.values())


@dataclass(frozen=True)
class TwoModes:
    """A region of two parts: probability of the lower and of the upper one, their widths, and the gap between them."""

    low: float
    high: float
    low_width: float
    high_width: float
    gap: float

    def unlike(self, fraction: float) -> float:
        """How far this is from two modes of similar height, wide apart, the smaller with this fraction of both."""
        small = min(self.low, self.high) / (self.low + self.high)
        heights = math.log((self.low / self.low_width) / (self.high / self.high_width))
        return abs(small - fraction) + 0.1 * abs(heights) - 0.01 * self.gap


def two_modes(p: er.PredictiveDistribution, intervals: Sequence[Tensor]) -> dict[int, TwoModes]:
    """The rows whose region has exactly two parts."""
    rows = [row for row, interval in enumerate(intervals) if len(interval) == 2]
    if not rows:
        return {}
    ends = torch.zeros(4, len(intervals), 1, dtype=torch.float64)
    ends[:, rows, 0] = torch.stack([intervals[row].double().cpu().reshape(4) for row in rows], 1)
    parts = p.cdf(ends).double().cpu().diff(dim=0)
    widths = ends[..., 0].diff(dim=0)
    facts = torch.stack([parts[0], parts[2], widths[0], widths[2], widths[1]])
    return {row: TwoModes(*facts[:, row].tolist()) for row in rows}


def run_full(settings: Sequence[Setting], seeds: Sequence[int], output: Path) -> None:
    """Train every model of every setting with several seeds, and print the README's table.

    The results are written again after each run, so that an interrupt loses none.
    """
    results: dict[str, Any] = {
        "command": "python -m energyreg.demo --full",
        "seeds": list(seeds),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "runs": [],
    }
    for setting in settings:
        data = load(setting)
        results["data"] = describe_data(data)
        for seed in seeds:
            for name in full_models(data.x.shape[1], setting):
                print(f"{name}, seed {seed}", flush=True)
                torch.manual_seed(seed)
                run = run_model(full_models(data.x.shape[1], setting)[name], data, setting, seed)
                results["runs"].append({"model": name, "seed": seed, "setting": asdict(setting)} | run.as_json())
                save_json(output / "results.json", results)
    print(markdown_table(results["runs"]))


def full_models(num_features: int, setting: Setting) -> dict[str, er.EnergyRegressionModel]:
    """The models of the report, and the energy with its own mixture as base."""
    models = build_models(num_features, setting)
    encoder = er.encoders.TableEncoder(num_features, context_dim=setting.width, dropout=setting.dropout)
    mixture = er.proposals.MixtureDensityNetwork(setting.width, 1, setting.num_components)
    base = er.bases.ProposalBase(er.bases.Marginal(1))
    head = er.heads.SeparableHead(setting.width, 1)
    models[f"{ENERGY} on a mixture"] = er.EnergyRegressionModel(encoder, head, proposal=mixture, base=base)
    labels = {MIXTURE: f"{MIXTURE}, K = {setting.num_components}"}
    return {f"{labels.get(name, name)}, width {setting.width}": model for name, model in models.items()}


def markdown_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the mean scores over the seeds, with the standard deviation of the NLL."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for run in runs:
        groups.setdefault(run["model"], []).append(run["scores"])
    means = {name: {s.key: statistics.fmean(g[s.key] for g in group) for s in SCORES} for name, group in groups.items()}
    lines = ["| Model | " + " | ".join(column.name for column in SCORES) + " |", "|---|" + "---:|" * len(SCORES)]
    for name, group in groups.items():
        cells = []
        for column in SCORES:
            text = column.show(means[name][column.key])
            if column.key == "nll" and len(group) > 1:
                text += f" ± {statistics.stdev(g['nll'] for g in group):.3f}"
            cells.append(f"**{text}**" if column.is_best(name, means) else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def print_scores(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Print the table of scores, the best ones in colour on a terminal."""

    def marked(score: Score, name: str) -> str:
        text = score.show(scores[name][score.key])
        return f"[bold green]{text}[/]" if score.is_best(name, scores) else text

    lines = [[name, *(marked(score, name) for score in SCORES)] for name in scores]
    print_table(["Protein, test rows", *(score.name for score in SCORES)], lines, width=140)


def save_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as readable JSON, all or nothing."""
    write_atomically(path, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())


def load(setting: Setting) -> Protein:
    """The protein table, each part cut to `setting.max_rows`."""
    data = load_protein()
    if setting.max_rows is None:
        return data
    return replace(data, **{part: getattr(data, part)[: setting.max_rows] for part in ("train", "validation", "test")})


def describe_data(data: Protein) -> dict[str, Any]:
    """Name and sizes of the data."""
    rows = {part: len(getattr(data, part)) for part in ("train", "validation", "test")}
    return {"name": "UCI protein (CASP)", "features": data.x.shape[1], "rows": rows}


def describe_machine() -> dict[str, Any]:
    """What the times were taken on."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    threads = torch.get_num_threads()
    return {"processor": processor, "cores": os.cpu_count(), "threads": threads, "system": platform.system()}


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    versions = {"python": platform.python_version(), "energyreg": er.__version__}
    for package in ("torch", "numpy", "lightning-fabric", "scoringrules"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def describe_setup(results: Mapping[str, Any]) -> dict[str, str]:
    """The facts of the run, as the page tells them."""
    setting, data, machine, models = (results[key] for key in ("setting", "data", "machine", "models"))
    rows = data["rows"]
    return {
        "Data": f"{data['name']}, {sum(rows.values()):,} rows, {data['features']} inputs; y is the RMSD in ångström",
        "Split": f"{rows['train']:,} rows for training, {rows['validation']:,} for validation, {rows['test']:,} for "
        "the test; fixed",
        "Models": f"the same encoder for all, of width {setting['width']} with dropout {setting['dropout']}; "
        f"a mixture of {setting['num_components']} Gaussians",
        "Parameters": ", ".join(f"{name} {model['parameters']:,}" for name, model in models.items()),
        "Training": f"{setting['epochs']} epochs each, peak learning rate {setting['learning_rate']}",
        "Best epoch": ", ".join(f"{name} {model['best_epoch']}" for name, model in models.items()),
        "Seed": str(results["seed"]),
        "Machine": f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s), "
        f"{machine['system']}",
        "Versions": ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        "Duration": f"{results['seconds']:.0f} s for training and scores of all models",
        "Command": results["command"],
    }


def run(output: Path, seed: int, epochs: int | None = None, full_seeds: Sequence[int] | None = None) -> None:
    """Run the demo.

    Args:
        output: Folder of the results.
        seed: Seed of weights, batches and dropout.
        epochs: Passes over the training rows; the setting's own by default.
        full_seeds: Train the larger models instead, each with these seeds.
    """
    check_writable(output / "results.json")
    try:
        if full_seeds is None:
            run_quick(replace(QUICK, epochs=epochs or QUICK.epochs), seed, output)
        else:
            run_full([replace(setting, epochs=epochs or setting.epochs) for setting in FULL], full_seeds, output)
    except KeyboardInterrupt:
        stop("Stopped.", INTERRUPTED)


if __name__ == "__main__":
    from energyreg.cli.app import app

    app(["demo", *sys.argv[1:]], prog_name="energyreg")
