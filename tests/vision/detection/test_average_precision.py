"""Average precision, against what can be counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from energyreg.vision.detection.average_precision import THRESHOLDS, average_precision

pytest.importorskip("torchmetrics")
pytest.importorskip("faster_coco_eval")

TRUE = {"boxes": torch.tensor([[0.0, 0.0, 100.0, 100.0]]), "labels": torch.tensor([1])}


def _found(*boxes: list[float]) -> dict[str, Tensor]:
    """Detections of class 1, with scores from the first on."""
    count = len(boxes)
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.ones(count, dtype=torch.long),
        "scores": torch.linspace(0.9, 0.5, count),
    }


def test_a_perfect_detection_scores_one_and_none_scores_zero() -> None:
    assert set(average_precision([_found([0.0, 0, 100, 100])], [TRUE]).values()) == {1.0}
    assert set(average_precision([_found()], [TRUE]).values()) == {0.0}


def test_thresholds_tell_how_well_the_box_fits() -> None:
    """IoU = 0.82: right up to the threshold 0.8, so at 7 of 10."""
    values = average_precision([_found([0.0, 0, 100, 82])], [TRUE])
    assert values.keys() == {"AP", *(f"AP{100 * t:g}" for t in THRESHOLDS)}
    assert values["AP80"] == 1 and values["AP85"] == 0
    assert values["AP"] == pytest.approx(0.7)


def test_a_false_detection_before_the_right_one_halves_the_precision() -> None:
    values = average_precision([_found([200.0, 200, 300, 300], [0.0, 0, 100, 100])], [TRUE], (0.5,))
    assert values["AP50"] == pytest.approx(0.5)


def test_without_targets_it_is_not_a_number() -> None:
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    assert math.isnan(average_precision([_found([0.0, 0, 9, 9])], [empty])["AP"])
    with pytest.raises(ValueError, match="zip"):
        average_precision([_found()], [TRUE, TRUE])
