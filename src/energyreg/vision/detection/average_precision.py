"""Average precision of detections, as COCO counts it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

__all__ = ["average_precision"]

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""COCO's thresholds of IoU."""


def average_precision(
    detections: Iterable[Mapping[str, Tensor]],
    targets: Iterable[Mapping[str, Tensor]],
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, float]:
    """Average precision over recall, mean over the classes that occur, for each threshold of IoU.

    Args:
        detections: "boxes", "scores" and "labels" of each image.
        targets: "boxes" and "labels" of each image.
        thresholds: Thresholds of IoU.

    Returns:
        "AP", the mean over the thresholds, and "AP50", "AP75", ... for each of them, between 0 and 1; NaN where there
        are no targets.

    Raises:
        ImportError: torchmetrics or its evaluator is not installed.
        ValueError: There are not as many detections as targets.

    Source:
        Lin et al., "Microsoft COCO", ECCV 2014; computed by torchmetrics with faster-coco-eval.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(
            iou_thresholds=list(thresholds), extended_summary=True, backend="faster_coco_eval"
        )
    except (ImportError, ModuleNotFoundError) as error:
        raise ImportError(
            "Average precision needs torchmetrics and faster-coco-eval. Install them with: pip install "
            "'energyreg[vision]'"
        ) from error
    metric.warn_on_many_detections = False
    for found, true in zip(detections, targets, strict=True):
        metric.update(
            [{name: found[name].detach().cpu() for name in ("boxes", "scores", "labels")}],
            [{name: true[name].detach().cpu() for name in ("boxes", "labels")}],
        )
    precision = metric.compute()["precision"][..., 0, -1]  # (T, R, K): all areas, 100 detections an image
    values = {}
    for threshold, table in zip(thresholds, precision, strict=True):
        known = table[table > -1]  # -1: a class without targets
        values[f"AP{100 * threshold:g}"] = float(known.mean()) if len(known) else float("nan")
    return {"AP": sum(values.values()) / len(values), **values}
