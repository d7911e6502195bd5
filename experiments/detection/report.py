"""Tables and verdicts from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.detection.data import SETS
from experiments.detection.methods import METHODS
from experiments.detection.scores import THRESHOLDS
from experiments.results import Record, Records, mark, mean_and_error, read, standard_error, write_page

__all__ = ["report"]


RIVALS = ("direct", "direct-iterated")
"""Regressions without an energy on the same crops: what an energy must be ahead of."""
CLAIMED = ("nce+", "ours")
GAIN, SHARE = 2.0, 50.0
"""Targets: points of AP over the detector, and percent of its own time."""


def difference(records: Records, info: str, one: str, other: str, score: str = "AP") -> np.ndarray:
    """A score of one method minus another's on the folds that both have."""
    mine, theirs = records.get((info, one), {}), records.get((info, other), {})
    return np.array([mine[fold][score] - theirs[fold][score] for fold in sorted(set(mine) & set(theirs))])


def beyond(gain: np.ndarray, least: float = 0.0) -> bool:
    """Whether a gain is at least so much, and above zero by more than its standard error."""
    return len(gain) > 1 and bool(gain.mean() >= least) and bool(gain.mean() > standard_error(gain))


def _known(records: Records, info: str) -> list[str]:
    return [method.name for method in METHODS if records.get((info, method.name))]


def _boxes_table(records: Records, info: str) -> list[str]:
    lines = ["| method | folds | AP | AP − detector's | AP − direct's | AP50 | AP75 | AP90 | IoU | IoU − detector's | "
             "better | ms | share | share in bulk |", "|---|---|" + "---|" * 12]  # fmt: skip
    for method in _known(records, info):
        found = [record for _, record in sorted(records[info, method].items())]
        means = {name: np.mean([record[name] for record in found]) for name in (*THRESHOLDS, "iou_after", "better")}
        gain = np.array([100 * (record["iou_after"] - record["iou_before"]) for record in found])
        itself = method == "detector"
        time = np.mean([record["detector_milliseconds" if itself else "milliseconds"] for record in found])
        against = ["" if method == other or itself else mean_and_error(difference(records, info, method, other), 1, "+")
                   for other in ("detector", "direct")]  # fmt: skip
        cells = [
            mean_and_error(np.array([record["AP"] for record in found]), 1), *against,
            *(f"{means[name]:.1f}" for name in THRESHOLDS[1:]), f"{100 * means['iou_after']:.1f}",
            "" if itself else mean_and_error(gain, 2, "+"), "" if itself else f"{100 * means['better']:.0f} %",
            f"{time:.0f}", *("" if itself else f"{share(records, info, method, which).mean():.0f} %"
                             for which in ("milliseconds", "milliseconds_in_bulk")),
        ]  # fmt: skip
        lines.append(f"| {method} | {len(found)} | " + " | ".join(cells) + " |")
    return lines


def share(records: Records, info: str, method: str, which: str = "milliseconds") -> np.ndarray:
    """Time of the refinement in percent of the detector's own, on all folds of a method."""
    found = records.get((info, method), {}).values()
    return np.array([100 * record[which] / record["detector_milliseconds"] for record in found])


def _honesty(records: Records, info: str, method: str) -> dict[int, Record]:
    """The calibrations of a method by fold."""
    found = records.get((info, method), {})
    return {fold: found[fold]["calibration"] for fold in sorted(found) if found[fold].get("calibration")}


def _density_table(records: Records, info: str) -> list[str]:
    columns = ("coverage", "standardised", "pit", "effective_samples")
    lines = []
    for method in _known(records, info):
        mine, theirs = (_honesty(records, info, name) for name in (method, "gaussian"))
        if not mine:
            continue
        nll = np.array([each["nll"] for each in mine.values()], dtype=float)
        ahead = np.array([mine[fold]["nll"] - theirs[fold]["nll"] for fold in sorted(set(mine) & set(theirs))])
        coverage, standardised, pit, worth = (np.mean([each[name] for each in mine.values()]) for name in columns)
        scored = [record for record in records[info, method].values() if "rescored" in record]
        extra = np.array([record["rescored"]["AP"] - record["AP"] for record in scored])
        cells = [
            mean_and_error(nll, 2), "" if method == "gaussian" else mean_and_error(ahead, 2, "+"),
            f"{100 * coverage:.0f} %", f"{standardised:.3g}", f"{pit:.3f}", f"{worth:.0f}",
            mean_and_error(np.array([record["rescored"]["AP"] for record in scored]), 1), mean_and_error(extra, 1, "+"),
        ]  # fmt: skip
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    head = ["| method | NLL | NLL − Gaussian's | coverage of 90 % | standardised error | PIT distance | "
            "effective samples | AP, rescored | − AP |", "|---|" + "---|" * 8]  # fmt: skip
    return [*head, *lines] if lines else []


def _settings(records: Records, info: str) -> list[str]:
    """What was chosen on the development pictures, fold by fold."""
    parts = []
    for method in _known(records, info):
        found = records[info, method]
        chosen = [
            ", ".join(f"{name} {_short(value)}" for name, value in found[fold]["setting"].items())
            for fold in sorted(found)
        ]
        if any(chosen):
            parts.append(f"{method}: {' / '.join(chosen)}")
    return ["Chosen on the development pictures, by fold. " + "; ".join(parts) + "."] if parts else []


def _short(value: Any) -> str:
    return "–".join(f"{each:g}" for each in (value[0], value[-1])) if isinstance(value, list) else f"{value}"


def _verdicts(records: Records) -> list[str]:
    sets = [info.name for info in SETS if _known(records, info.name)]
    lines = []
    for method in CLAIMED:
        good, parts = 0, []
        for info in sets:
            gain = difference(records, info, method, "detector")
            rivals = [name for name in RIVALS if len(difference(records, info, method, name))]
            if not len(gain) or not rivals:
                continue
            strongest = min(rivals, key=lambda name, info=info: difference(records, info, method, name).mean())
            lead = difference(records, info, method, strongest)
            fine = beyond(gain, GAIN) and beyond(lead)
            good += fine
            parts.append(
                f"{info} {mean_and_error(gain, 1, '+')} over the detector, {mean_and_error(lead, 1, '+')} over "
                f"{strongest}, {mark(fine)}"
            )
        lines.append(
            f"- {method}: at least {GAIN:+.1f} AP over the detector and ahead of direct regression, both by more than "
            f"one s.e.: **{good} of {len(parts)}** sets (target: 2 of 3). {'; '.join(parts)}."
        )
    for method in CLAIMED:
        parts, good = [], 0
        for info in sets:
            found = share(records, info, method)
            if len(found):
                good += found.mean() <= SHARE
                bulk = share(records, info, method, "milliseconds_in_bulk").mean()
                parts.append(f"{info} {found.mean():.0f} %, {mark(bool(found.mean() <= SHARE))} (in bulk {bulk:.0f} %)")
        lines.append(
            f"- {method}: refinement in at most {SHARE:.0f} % of the detector's own time: **{good} of {len(parts)}** "
            f"sets. {'; '.join(parts)}."
        )
    return lines


def report(results: Path) -> None:
    """Write README.md into the folder of results.

    Args:
        results: Folder of results.
    """
    records = read(results, "set", "fold")
    lines = [
        "# Results", "", "Made by `python -m experiments.detection report`; see ../README.md for what everything is. "
        "Mean ± standard error over folds; differences are paired by fold. AP in percent, over IoU from 0.5 to 0.95. "
        "IoU: mean IoU with the true boxes that the detector's box overlaps by half at least, in percent, and the "
        "share of boxes that are better than before. Times are of one processor for a picture, the detector's own and "
        "that of the refinement, and their ratio; in bulk, the boxes of all test pictures are refined at once. NLL in "
        "nats per pixel⁴ at the true boxes; coverage of the coordinates by their central 90 % intervals; root mean "
        "square of the standardised errors, 1 where honest; Kolmogorov's distance of the probability integral "
        "transforms from uniform ones; and how many samples the 256 weighted ones of a box are worth (median), "
        "without which the columns before mean little.",
        "", "## Targets", "",
        *_verdicts(records), "",
    ]  # fmt: skip
    for info in SETS:
        if not _known(records, info.name):
            continue
        some = next(iter(records[info.name, _known(records, info.name)[0]].values()))
        density = _density_table(records, info.name)
        lines += [
            f"## {info.name}", "", f"{len(info.classes)} class{'es' if len(info.classes) > 1 else ''}; "
            f"fold {some['fold']} has {some['pictures']} test pictures with {some['boxes']} boxes, of which the "
            f"detector finds {100 * some['matched']:.0f} %.", "",
            *_boxes_table(records, info.name), "", *([*density, ""] if density else []),
            *_settings(records, info.name), "",
        ]  # fmt: skip
    while not lines[-1]:
        lines.pop()
    write_page(results, [*lines, ""])
