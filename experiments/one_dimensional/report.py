"""Tables and pictures, from the results on disk alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.one_dimensional.evaluation import LOWEST, cached_task, window
from experiments.one_dimensional.tasks import Task

__all__ = ["DOCS", "fill", "report"]

PICTURED = -4.0
"""Log-densities from here up have a colour of their own."""
ANCHORS = """\
The papers' own tables could not be read; no figure of theirs is quoted here. As an anchor, single seeds of a plain
re-implementation of paper II's code (own measurement) gave on toy 1: NCE .082 and .162, ML-IS .091, NCE+ .060."""
COLUMNS = 4
"""Panels in a row of a picture."""


@dataclass(frozen=True)
class Outcome:
    """All results of a setting."""

    name: str
    records: list[dict[str, Any]]

    def __getattr__(self, key: str) -> Any:
        return self.records[0][key]

    @cached_property
    def seeds(self) -> int:
        """Number of seeds."""
        return sum(len(record["seeds"]) for record in self.records)

    def values(self, key: str) -> np.ndarray | None:
        """One number a seed, NaN where it was not finite; None where the setting has no such number."""
        if self.records[0].get(key) is None:
            return None
        return np.array([np.nan if value is None else value for record in self.records for value in record[key]])

    def single(self, key: str) -> np.ndarray | None:
        """One number a block, where the blocks have it."""
        found = [record[key] for record in self.records if record.get(key) is not None]
        return np.array(found) if found else None

    @property
    def diverged(self) -> int:
        """Seeds with a loss or a result that is not finite."""
        failed = np.array([value for record in self.records for value in record["diverged"]])
        return int((failed | ~np.isfinite(self.values("kl"))).sum())

    @property
    def seconds_per_seed(self) -> float:
        """Training and evaluation of seeds that were trained together, on one thread.

        The median over the blocks, for some ran beside other work, or were paused for it.
        """
        return statistics.median(record["seconds"] / len(record["seeds"]) for record in self.records)


def read(results: Path) -> list[Outcome]:
    """The results that are there, in the order of the list of settings."""
    from experiments.one_dimensional.settings import SETTINGS

    order = {setting.name: i for i, setting in enumerate(SETTINGS)}
    found = []
    for folder in sorted(results.iterdir(), key=lambda path: (order.get(path.name, len(order)), path.name)):
        records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        if records:
            found.append(Outcome(folder.name, records))
    return found


def _mean(values: np.ndarray, best: int | None = None) -> str:
    """Mean ± standard deviation (ddof = 0, as in the papers) of the finite values, or of the best of more."""
    finite = np.sort(values[np.isfinite(values)])[:best]
    if not len(finite) or (best is not None and best >= len(values)):
        return "–"
    return f"{finite.mean():.3f}" if len(finite) == 1 else f"{finite.mean():.3f} ± {finite.std():.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def _methods(outcomes: Sequence[Outcome]) -> str:
    """The table of a task."""
    with_test = any(outcome.values("test_nll") is not None for outcome in outcomes)
    header = ["method", "M", "D_KL, all seeds", "D_KL, best 5"]
    header += ["test NLL, all seeds", "test NLL, best 5"] if with_test else []
    rows = []
    for outcome in outcomes:
        for prefix, title in (("", outcome.method), ("proposal_", f"{outcome.method}: its proposal")):
            kl, nll = outcome.values(f"{prefix}kl"), outcome.values(f"{prefix}test_nll")
            if kl is None:
                continue
            cells = [title, str(outcome.samples or "–"), _mean(kl), _mean(kl, 5)]
            if with_test:
                cells += ["–", "–"] if nll is None else [_mean(nll), _mean(nll, 5)]
            cells += [str(outcome.seeds), str(outcome.diverged), f"{outcome.seconds_per_seed:.0f}"]
            rows.append(cells)
        together = outcome.single("ensemble_kl")
        if together is not None:
            cells = [f"{outcome.method}: the seeds as an ensemble", "–", _mean(together), "–"]
            nll = outcome.single("ensemble_test_nll")
            if with_test:
                cells += ["–" if nll is None else _mean(nll), "–"]
            rows.append([*cells, str(outcome.seeds), "–", "–"])
    return _table([*header, "seeds", "diverged", "s / seed"], rows)


def _samples(outcomes: Sequence[Outcome]) -> str:
    """D_KL by method and M, over the first five seeds."""
    sizes = sorted({outcome.samples for outcome in outcomes})
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    cells = {(outcome.method, outcome.samples): _mean(outcome.values("kl")[:5]) for outcome in outcomes}
    rows = [[method, *(cells.get((method, m), "–") for m in sizes)] for method in methods]
    return _table(["method", *(f"M = {m}" for m in sizes)], rows)


# Pictures ------------------------------------------------------------------------------------------------------------


def _truth(task: Task, shape: tuple[int, int]) -> np.ndarray:
    x = torch.linspace(*task.x_range, shape[0], dtype=torch.double)
    y = torch.linspace(*window(task), shape[1], dtype=torch.double)
    return task.log_prob(x[:, None], y).clamp_min(LOWEST).numpy()


def _oracle_nll(task: Task) -> float:
    assert task.test is not None
    x, y = (part.double() for part in task.test)
    return -float(task.log_prob(x, y).mean())


def _picture(task: Task, outcomes: Sequence[Outcome], results: Path) -> Figure:
    """Data, truth, and the learned density of the first seed of each method."""
    panels: list[tuple[str, np.ndarray | None]] = [("training data", None)]
    for outcome in outcomes:
        path = results / outcome.name / "density.npz"
        if path.exists():
            title = outcome.method.replace("J_KL", "$J_{KL}$").replace(", K by", ",\nK by")
            title += f", M = {outcome.samples}" if outcome.samples not in (0, 1024) else ""
            title += f"\n$D_{{KL}}$ = {outcome.values('kl')[0]:.3f}"
            panels.append((title, np.load(path)["log_density"].astype(float)))
    panels.insert(1, ("truth", _truth(task, panels[-1][1].shape)))

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns, 2.75 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    x_range, y_range = task.x_range, window(task)
    highest = float(np.quantile(panels[1][1], 0.998))
    image = None
    for ax, panel in zip(axes.flat, [*panels, *[None] * (axes.size - len(panels))], strict=True):
        if panel is None:
            ax.set_visible(False)
            continue
        title, log_density = panel
        ax.set_title(title, fontsize=9)
        ax.set(xlim=x_range, ylim=y_range)
        if log_density is None:
            ax.plot(*(part[:, 0].numpy() for part in task.train), ".", markersize=1.5, color="black", alpha=0.4)
        else:
            image = ax.imshow(
                log_density.T, origin="lower", extent=(*x_range, *y_range), aspect="auto", cmap="magma",
                vmin=PICTURED, vmax=highest, interpolation="nearest", rasterized=True,
            )  # fmt: skip
    for ax in axes[:, 0]:
        ax.set_ylabel("$y$")
    for column in axes.T:
        visible = [ax for ax in column if ax.get_visible()]
        visible[-1].set_xlabel("$x$")
        visible[-1].tick_params(labelbottom=True)
    figure.colorbar(image, ax=axes, label=r"$\log p(y|x)$", extend="min", aspect=40, shrink=0.8, pad=0.01)
    figure.suptitle(task.title)
    return figure


def report(results: Path) -> None:
    """Write README.md and a picture of each task into the folder of results.

    Args:
        results: Folder of results.

    Raises:
        FileNotFoundError: If there are none.
    """
    outcomes = read(results) if results.is_dir() else []
    if not outcomes:
        raise FileNotFoundError(f"{results} holds no results; make some: python -m experiments.one_dimensional run.")
    parts = [
        "# One-dimensional experiments: results",
        "Written by `python -m experiments.one_dimensional report`. Mean ± standard deviation over all seeds (diverged "
        "ones, which have no number, are counted apart), and over the best 5 by the number itself: this is the papers' "
        "rule, which selects on the test metric, so read it beside their tables only. D_KL is from the truth to the "
        "model on the papers' grid; it and the test NLL are in nats. Seeds are trained side by side on one thread; "
        "*s / seed* is the time of a block over its seeds, evaluation included, on machines that did other work too.",
        ANCHORS,
    ]
    for name in dict.fromkeys(outcome.task for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.task == name]
        main = [outcome for outcome in mine if not _in_study(outcome)]
        study_methods = {outcome.method for outcome in mine if _in_study(outcome)}
        study = [outcome for outcome in mine if outcome.method in study_methods]
        task = cached_task(name)
        parts.append(f"## {name}: {task.title}")
        if task.test is not None:
            parts.append(f"Test NLL of the true density: {_oracle_nll(task):.3f}.")
        if main:
            parts.append(_methods(main))
        if study:
            parts += ["D_KL by the number of samples M, over seeds 0 to 4:", _samples(study)]
        pictured = [outcome for outcome in main if (results / outcome.name / "density.npz").exists()]
        if pictured:
            with mpl.rc_context({"font.size": 9}):
                _picture(task, pictured, results).savefig(results / f"{name}.png", dpi=110)
            parts.append(f"![data, truth and learned densities]({name}.png)")
    machines = sorted({f"{record['cpu']}, torch {record['torch']}" for o in outcomes for record in o.records})
    dates = sorted({record["date"] for outcome in outcomes for record in outcome.records})
    parts.append(f"Made on {'; '.join(machines)}; {dates[0]} to {dates[-1]}.")
    (results / "README.md").write_text("\n\n".join(parts) + "\n")


DOCS = Path(__file__).parents[2] / "docs" / "objectives.md"
"""The page whose tables are made of the results."""

_ROWS = [
    ("ML-IS", "mlis"), ("KLD-IS", "kldis"), ("NCE", "nce"), ("NCE+", "nceplus"), ("score matching", "sm"),
    ("denoising score matching (M = 64)", "dsm-m64"), ("ML-MCMC, 16 steps (M = 64)", "mlmcmc16-m64"),
    ("NCE, noise by hand, network of paper IV", "nce-hand"), ("NCE + J_KL, K = 1", "nce-jkl-k1"),
    ("NCE + J_KL, K = 4", "nce-jkl-k4"), ("NCE + J_KL, K = 16", "nce-jkl-k16"), ("joint J, K = 4", "joint-k4"),
    ("self-normalised likelihood, K = 4", "snl-k4"), ("mixture density network, K = 4", "mdn-k4"),
    ("the same with an energy-based teacher", "teacher-k4"), ("mixture density network, K = 8", "mdn-k8"),
    ("the same with an energy-based teacher", "teacher-k8"), ("**library**: energy on the marginal", "library"),
    ("**library**: energy on a mixture", "on-mixture"), ("**library**: `EdgeHead` on the marginal", "edges"),
    ("**library**: mixture, K by validation", "library-mixture"),
]  # fmt: skip


def fill(page: Path, results: Path) -> None:
    """Put the tables of the results into a page, between the comments that mark their places.

    Args:
        page: Markdown with ``<!-- table --> … <!-- /table -->`` and the same for ``study``.
        results: Folder of results.
    """
    found = {outcome.name: outcome for outcome in read(results)}

    def cell(name: str, key: str = "kl") -> str:
        values = found[name].values(key) if name in found else None
        return "–" if values is None else _mean(values) + f" ({found[name].seeds})"

    rows = []
    for title, short in _ROWS:
        cells = [cell(f"toy1-{short}"), cell(f"toy2-{short}"), cell(f"paper4-{short}")]
        rows.append([title, *cells, cell(f"paper4-{short}", "test_nll"), cell(f"slabs-{short}")])
    header = ["method", "toy 1", "toy 2", "task 2 of paper IV", "its test NLL (truth 1.239)", "slabs"]
    study = [outcome for outcome in found.values() if outcome.task == "toy1"]
    sampled = {outcome.method for outcome in study if _in_study(outcome)}
    tables = {
        "table": _table(header, rows),
        "study": _samples([outcome for outcome in study if outcome.method in sampled]),
    }
    text = page.read_text()
    for mark, table in tables.items():
        start, stop = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{table}\n{stop}{rest.split(stop)[1]}"
    page.write_text(text)


def _in_study(outcome: Outcome) -> bool:
    return outcome.samples in (8, 32, 128)
