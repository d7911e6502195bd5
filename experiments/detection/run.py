"""Works through sets, folds and methods; a result that is there is not made again."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from energyreg.cli.demo import describe_machine
from energyreg.vision import paired_iou
from experiments.claims import do_each, in_processes
from experiments.detection.data import FOLDS, BoxSet, Fold, load, split
from experiments.detection.detector import Boxes, Seen, detector_of, see
from experiments.detection.methods import STEPS, Method, Outcome, Study
from experiments.detection.scores import calibration, matched, precision, with_boxes

__all__ = ["RESULTS", "path_of", "prepare", "run", "work"]

RESULTS = Path(__file__).parent / "results"
CROWDED = 0.95
"""IoU from which on the detector's boxes are suppressed where a regression is to learn from them."""
TIMED = 12
"""Test pictures by which the time is taken."""
CALIBRATED, RESCORED = 256, 64
"""Importance samples of a box for its calibration, and for its expected IoU."""
WITH_SCORES = ("gaussian", "nce+", "ours")
"""Methods whose expected IoU also makes new scores."""

Piece = tuple[BoxSet, int, Method]


def work(sets: Sequence[BoxSet], methods: Sequence[Method], folds: int = FOLDS) -> list[Piece]:
    """All pieces of work in order: a fold of a set by all methods, then of the next set."""
    return [(info, number, method) for number in range(folds) for info in sets for method in methods]


def path_of(piece: Piece, results: Path) -> Path:
    """File of a result."""
    info, number, method = piece
    return results / info.name / method.name / f"{number}.json"


def prepare(fold: Fold, detector: Any, steps: int, seed: int = 0) -> tuple[Study, Seen]:
    """What methods train on, and what they are judged on."""
    mirrored = [each for picture in fold.train for each in (picture, picture.flipped())]
    study = Study(detector, see(detector, mirrored, CROWDED), see(detector, fold.development), steps, seed)
    return study, see(detector, fold.test)


def milliseconds(study: Study, test: Seen, outcome: Outcome) -> tuple[float, float]:
    """Time of a processor for a picture: the detector's, and that of the refinement of its boxes."""
    detected = test.detected
    own = refining = 0.0
    count = min(TIMED, len(test.pictures))
    for place in range(count):
        rows = detected[detected.image == place]
        with torch.no_grad():
            started = time.process_time()
            study.detector([test.pictures[place].image])
        own += time.process_time() - started
        started = time.process_time()
        outcome.refine(test, rows) if len(rows) else None
        refining += time.process_time() - started
    return 1000 * own / count, 1000 * refining / count


def do(piece: Piece, study: Study, test: Seen) -> dict[str, Any]:
    """Train and judge: a record for JSON."""
    info, number, method = piece
    outcome = method.fit(study)
    detected, true = test.detected, test.true
    started = time.process_time()
    boxes = outcome.refine(test, detected)
    all_of_them = time.process_time() - started
    rows, chosen = matched(detected, true)
    before, after = (paired_iou(each[rows], true.boxes[chosen]).double() for each in (detected.boxes, boxes))
    own, refining = milliseconds(study, test, outcome)
    record = {
        "set": info.name, "fold": number, "method": method.name,
        **precision(test, with_boxes(test, boxes)),
        "iou_before": float(before.mean()), "iou_after": float(after.mean()),
        "better": float((after > before).double().mean()), "matched": len(rows) / max(len(true), 1),
        "pictures": len(test.pictures), "boxes": len(true), "detections": len(detected),
        "milliseconds": refining, "milliseconds_in_bulk": 1000 * all_of_them / len(test.pictures),
        "detector_milliseconds": own, "setting": outcome.setting, "development_iou": outcome.iou,
        "fit_seconds": round(outcome.seconds, 1), "torch": torch.__version__,
        "cpu": describe_machine()["processor"], "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip
    if outcome.density is not None and len(rows):
        moved = Boxes(detected.image[rows], boxes[rows], detected.labels[rows])
        record["calibration"] = calibration(outcome.density(test, moved, CALIBRATED), true.boxes[chosen])
        if method.name in WITH_SCORES:
            everything = Boxes(detected.image, boxes, detected.labels)
            expected = outcome.density(test, everything, RESCORED).expected_iou(boxes)
            scores = torch.cat([each["scores"] for each in test.detections]) * expected
            record["rescored"] = precision(test, with_boxes(test, boxes, scores))
    return _finite(record)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {
        key: _finite(value) if isinstance(value, dict)
        else None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }  # fmt: skip


def _work(pieces: Sequence[Piece], data: Path, cache: Path, results: Path, weights: str | None) -> bool:
    """Do all that is not done and that no other process is doing; return whether nothing went wrong."""
    torch.set_num_threads(1)
    known: dict[tuple[str, int], tuple[Study, Seen]] = {}

    def one(piece: Piece) -> tuple[str, str]:
        info, number, _ = piece
        if (info.name, number) not in known:
            known.clear()  # the feature maps of one fold fill a gigabyte
            fold = split(info, load(info, data, cache), number)
            known[info.name, number] = prepare(
                fold, detector_of(info, fold.train, number, cache, weights), STEPS[info.name], number
            )
        record = do(piece, *known[info.name, number])
        return json.dumps(record) + "\n", f"AP {record['AP']:.1f}, IoU {record['iou_after']:.3f}"

    return do_each(
        pieces, lambda piece: path_of(piece, results), lambda piece: f"{piece[0].name} {piece[1]} {piece[2].name}", one
    )


def run(
    pieces: Sequence[Piece], data: Path, cache: Path, results: Path = RESULTS, jobs: int = 1,
    weights: str | None = "package",
) -> bool:  # fmt: skip
    """Make all results that are not there; several of these may run at once on the same folder.

    Args:
        pieces: What to do.
        data: Folder of the data.
        cache: Folder of pictures and detectors.
        results: Folder of results.
        jobs: Processes, of one thread each.
        weights: Of the detectors' backbone.

    Returns:
        Whether every piece of work was done.
    """
    return in_processes(partial(_work, list(pieces), data, cache, results, weights), jobs)


def train_detectors(sets: Sequence[BoxSet], folds: int, data: Path, cache: Path) -> None:
    """Train all detectors that are not in the cache."""
    torch.set_num_threads(1)
    for info in sets:
        pictures = load(info, data, cache)
        for number in range(folds):
            detector_of(info, split(info, pictures, number).train, number, cache)
