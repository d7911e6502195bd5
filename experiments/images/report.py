"""Tables, verdicts and pictures from the results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.images.data import TASKS
from experiments.images.methods import METHODS, PAPER_COMPONENTS
from experiments.images.run import PICTURED
from experiments.results import Records, common, digits_for, mark, mean_and_error, read, standard_error, write_page

__all__ = ["report"]


ENERGIES = ("ours-tuned", "ours", "ours-gaussian", "ours-marginal", "ours-joint", "nce", "learned", "snl")
"""Energy-based models of one network each; ensembles are compared with ensembles."""
DIRECT = ("direct-l2", "direct-l1")
RIDGE = (4.4, 5.4, 4.3)
"""Errors in yaw, pitch and roll that the issue asks to be below: ridge regression's on all test rows."""


def values(records: Records, task: str, method: str, score: str, seeds: Sequence[int]) -> np.ndarray:
    """A score on some seeds; a diverged one counts as infinite, a missing one as none.

    "nll of NAME" is the NLL of what was trained on the way by that name.
    """
    variant = score.removeprefix("nll of ") if score.startswith("nll of ") else None

    def one(record: dict[str, Any]) -> float | None:
        found = record.get(score, math.nan) if variant is None else record.get("variants", {}).get(variant, math.nan)
        assert found is None or isinstance(found, (int, float))
        return found

    found = [one(records[task, method][seed]) for seed in seeds]
    return np.array([math.inf if value is None else value for value in found], dtype=float)


def _present(records: Records, task: str) -> list[str]:
    return [method.name for method in METHODS if records.get((task, method.name))]


def _scores_table(records: Records, task: str) -> list[str]:
    several = len(next(t for t in TASKS if t.name == task).targets) > 1
    columns = [
        ("NLL", "nll", 3), ("calibrated", "nll of calibrated", 3),
        ("energy score" if several else "CRPS", "crps", None), ("MAE", "mae", None),
        ("MAE, refined", "mae_refined", None), ("coverage", "coverage", 3), ("width", "width", None),
        ("training (s)", "fit_seconds", 0), ("test rows (s)", "predict_seconds", 1),
    ]  # fmt: skip
    lines = ["| method | seeds | " + " | ".join(title for title, _, _ in columns) + " |",
             "|---|---|" + "---|" * len(columns)]  # fmt: skip
    places = {}
    for _, score, digits in columns:
        means = [values(records, task, m, score, common(records, task, m)).mean() for m in _present(records, task)]
        places[score] = digits if digits is not None else digits_for(means, 5)
    for method in _present(records, task):
        seeds = common(records, task, method)
        cells = [mean_and_error(values(records, task, method, score, seeds), places[score]) for _, score, _ in columns]
        for index, (_, score, _) in enumerate(columns):
            if score.endswith("_seconds"):
                cells[index] = f"{values(records, task, method, score, seeds).mean():.{places[score]}f}"
        label = "*" if method in DIRECT else ""
        lines.append(f"| {method} | {len(seeds)} | {cells[0]}{label} | " + " | ".join(cells[1:]) + " |")
    return lines


def difference(records: Records, task: str, one: str, other: str, score: str = "nll") -> np.ndarray:
    """A score of one method minus another's on the seeds that both have."""
    seeds = common(records, task, one, other)
    return values(records, task, one, score, seeds) - values(records, task, other, score, seeds)


def _paired_table(records: Records, task: str) -> list[str]:
    lines = ["| method | NLL − mixture's | NLL − Gaussian's | MAE − best direct one's |", "|---|---|---|---|"]
    direct = best_direct(records, task)
    for method in _present(records, task):
        if method in DIRECT:
            continue
        cells = []
        for other, score in (("mixture", "nll"), ("gaussian", "nll"), (direct, "mae")):
            if other is None or other == method or not common(records, task, method, other):
                cells.append("")
                continue
            found = difference(records, task, method, other, score)
            cells.append(mean_and_error(found, 3 if score == "nll" else digits_for([found.mean()], 5), "+"))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def best_direct(records: Records, task: str) -> str | None:
    """The direct regression with the lower mean error."""
    known = [method for method in DIRECT if records.get((task, method))]
    seeds = common(records, task, *known) if known else []
    return min(known, key=lambda m: values(records, task, m, "mae", seeds).mean()) if seeds else None


def best_energy(records: Records, task: str) -> str | None:
    """The energy-based model with the lowest mean NLL on the validation rows, over the seeds that all of them have."""
    known = [method for method in ENERGIES if records.get((task, method))]
    seeds = common(records, task, *known) if known else []
    return min(known, key=lambda m: values(records, task, m, "validation_nll", seeds).mean()) if seeds else None


def _beyond(scores: np.ndarray) -> bool:
    """Whether the mean is below zero by more than its standard error; with one seed nothing is known."""
    return len(scores) > 1 and bool(np.isfinite(scores).all()) and scores.mean() < -standard_error(scores)


def _verdicts(records: Records) -> list[str]:
    tasks = [task.name for task in TASKS if _present(records, task.name)]
    lines = []
    chosen = {task: best_energy(records, task) for task in tasks}
    for other in ("mixture", "gaussian"):
        parts, good, told = [], 0, 0
        for task in tasks:
            ours = chosen[task]
            if ours is None or not common(records, task, ours, other):
                continue
            found = difference(records, task, ours, other)
            good, told = good + _beyond(found), told + 1
            parts.append(f"{task} ({ours}) {mean_and_error(found, 3, '+')}, {mark(_beyond(found), len(found) > 1)}")
        lines.append(f"- NLL below the {other}'s by more than 1 s.e.: **{good} of {told}** tasks. {'; '.join(parts)}.")
    lines += _calibrated(records, tasks)
    parts, good, told = [], 0, 0
    for task in tasks:
        ours, direct = chosen[task], best_direct(records, task)
        if ours is None or direct is None or not common(records, task, ours, direct):
            continue
        found = difference(records, task, ours, direct, "mae")
        fine = len(found) > 1 and bool(found.mean() <= standard_error(found))
        good, told = good + fine, told + 1
        text = mean_and_error(found, digits_for([found.mean()], 5), "+")
        parts.append(f"{task} ({ours} − {direct}) {text}, {mark(fine, len(found) > 1)}")
    lines.append(
        f"- MAE no worse than direct regression's by more than 1 s.e.: **{good} of {told}** tasks. {'; '.join(parts)}."
    )
    lines += _teacher(records, tasks)
    lines += _age(records, chosen)
    lines += _pose(records)
    return lines


def _calibrated(records: Records, tasks: Sequence[str]) -> list[str]:
    """Ours against the mixture where both are calibrated, and where the mixture is told of the atoms too."""
    parts = []
    for task in tasks:
        for other in ("mixture", "mixture-atoms"):
            if common(records, task, "ours-tuned", other):
                found = difference(records, task, "ours-tuned", other, "nll of calibrated")
                name = task if other == "mixture" else f"{task} against {other}"
                parts.append(f"{name} {mean_and_error(found, 3, '+')}, {mark(_beyond(found), len(found) > 1)}")
    if not parts:
        return []
    return [f"- The same of ours-tuned, both calibrated on the validation rows: {'; '.join(parts)}."]


def taught(records: Records, task: str) -> np.ndarray:
    """NLL of the taught mixture minus that of the same mixture without a teacher."""
    seeds = common(records, task, "teacher", "mixture")
    plain = [records[task, "mixture"][seed]["variants"][str(PAPER_COMPONENTS)] for seed in seeds]
    return values(records, task, "teacher", "nll", seeds) - np.array(plain)


def _teacher(records: Records, tasks: Sequence[str]) -> list[str]:
    parts, good, told = [], 0, 0
    for task in tasks:
        if common(records, task, "teacher", "mixture"):
            found = taught(records, task)
            good, told = good + _beyond(found), told + 1
            parts.append(f"{task} {mean_and_error(found, 3, '+')}, {mark(_beyond(found), len(found) > 1)}")
    return [
        f"- The teacher improves the NLL of the mixture of as many Gaussians ({PAPER_COMPONENTS}) by more than 1 s.e.: "
        f"**{good} of {told}** tasks (target: 3 of 4). {'; '.join(parts)}."
    ]


def _age(records: Records, chosen: dict[str, str | None]) -> list[str]:
    ours = chosen.get("age")
    if ours is None or not common(records, "age", ours, "direct-l1"):
        return []
    seeds = common(records, "age", ours, "direct-l1")
    one, other = (values(records, "age", method, "mae", seeds) for method in (ours, "direct-l1"))
    refined = records.get(("age", "nce"), {})
    more = f" Refined from the direct estimate: {np.mean([r['mae_refined'] for r in refined.values()]):.3f}."
    return [
        f"- Age MAE of {ours} {one.mean():.3f} against {other.mean():.3f} of direct L1 (mean of {len(seeds)} seeds; "
        f"the best seed of direct L1 {other.min():.3f}): {mark(bool(one.mean() <= other.mean()))} by the mean, "
        f"{mark(bool(one.mean() <= other.min()))} against its best seed.{more if refined else ''}"
    ]


def _pose(records: Records) -> list[str]:
    lines = []
    for method in [*ENERGIES, "ours-ensemble", *DIRECT]:
        found = [r["mae_by_target"] for r in records.get(("pose", method), {}).values() if "mae_by_target" in r]
        if not found:
            continue
        errors = np.mean(found, axis=0)
        below = [f"{error:.2f}" for error in errors]
        reached = bool((errors < RIDGE).all())
        lines.append(f"  - {method}: {' / '.join(below)}°, {mark(reached)}")
    if not lines:
        return []
    ridge = next((r["ridge"] for (_, _), found in records.items() for r in found.values() if "ridge" in r), None)
    own = f" (ours on the same rows: {' / '.join(f'{error:.2f}' for error in ridge)}°)" if ridge else ""
    wanted = " / ".join(map(str, RIDGE))
    return [f"- Head pose: MAE in yaw, pitch and roll below ridge regression's {wanted}°{own}:", *lines]


# ---------------------------------------------------------------------------------------------- pictures

COLOURS = {"gaussian": "#999999", "mixture": "#d95f02", "ours-tuned": "#1b6ca8"}


def draw(records: Records, task: str, folder: Path) -> Path | None:
    """A picture of the densities of some test rows with their true values, without any photograph.

    Returns:
        The file, or None where no densities were kept.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    kept = {m: records[task, m][0]["picture"] for m in PICTURED if "picture" in records.get((task, m), {}).get(0, {})}
    if not kept:
        return None
    info = next(t for t in TASKS if t.name == task)
    truth = next(iter(kept.values()))["truth"]
    figure, axes = pyplot.subplots(2, 3, figsize=(8, 4.2), layout="constrained")
    for number, axis in enumerate(axes.flat[: len(truth)]):
        for method, shown in kept.items():
            if "draws" in shown:
                draws = np.array(shown["draws"])[:, number]
                axis.plot(*draws.T, ".", markersize=2, color=COLOURS[method], label=method)
            else:
                axis.plot(shown["grid"], shown["density"][number], color=COLOURS[method], label=method, linewidth=1.2)
        if len(info.targets) > 1:
            axis.plot(*truth[number][:2], "k+", markersize=10, label="true value")
            axis.set(xlabel=f"{info.targets[0]} ({info.unit})", ylabel=f"{info.targets[1]} ({info.unit})")
        else:
            axis.axvline(truth[number][0], color="black", linewidth=0.8, linestyle="--", label="true value")
            axis.set(xlabel=f"{info.targets[0]} ({info.unit})", ylabel="density")
            axis.set_yscale("symlog", linthresh=1.0) if task == "steering" else None
    axes.flat[0].legend(fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}.png"
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path


def report(results: Path, pictures: Path | None = None) -> None:
    """Write README.md into the folder of results, and pictures into another.

    Args:
        results: Folder of results.
        pictures: Folder of the pictures; none without it.
    """
    records = read(results, "task", "seed")
    lines = [
        "# Results", "", "Made by `python -m experiments.images report`; see ../README.md for what everything is. Mean "
        "± standard error over the seeds that a method has so far; the paired differences are over those that both "
        "have, and with one seed nothing is known. NLL in nats and units of the target, lower is better. Which energy "
        "counts as our best is chosen by the NLL on the validation rows, among those of one network. (*) The "
        "likelihood of a direct regression is that of a normal or Laplace distribution around it, as wide as its "
        "errors on the validation rows.", "", "## Targets", "",
        *_verdicts(records), "",
    ]  # fmt: skip
    for task in TASKS:
        if not _present(records, task.name):
            continue
        lines += [f"## {task.name} ({task.unit})", "", *_scores_table(records, task.name), "",
                  *_paired_table(records, task.name), "", *_notes(records, task.name)]  # fmt: skip
        if pictures is not None and (path := draw(records, task.name, pictures)) is not None:
            print(f"Drew {path}.")
    write_page(results, lines)


def _notes(records: Records, task: str) -> list[str]:
    """What the tables leave out: the mixtures that were tried, and how exact Z is where it is sampled."""
    lines = []
    for method in ("mixture", "mixture-atoms", "ours-tuned"):
        if not (found := records.get((task, method))):
            continue
        names = [name for name in next(iter(found.values()))["variants"] if name != "calibrated"]
        tried = [
            f"{name} {mean_and_error(values(records, task, method, f'nll of {name}', sorted(found)), 3)}"
            for name in names
        ]
        chosen = "; ".join(
            f"{record['setting']['chosen']}, {record['setting']['regularisation']}"
            for _, record in sorted(found.items())
        )
        lines += [f"NLL of what {method} tried: {'; '.join(tried)}. Chosen by seed: {chosen}.", ""]
    errors = {
        method: values(records, task, method, "nll_integration_se", common(records, task, method)).max()
        for method in _present(records, task)
        if method in ENERGIES and "nll_integration_se" in next(iter(records[task, method].values()))
    }
    if errors:
        worst = ", ".join(f"{method} {error:.4f}" for method, error in errors.items())
        lines += [f"Largest standard error of the mean NLL by the importance sampling of Z: {worst}.", ""]
    return lines
