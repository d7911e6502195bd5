"""An energy head in a file."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

from energyreg.checks import check_type
from energyreg.densities.noise import GaussianNoise
from energyreg.files import BOX_HEAD, CheckpointError, fingerprint, with_suffix
from energyreg.models.checkpoint import check_sizes, load_state, reading, save_state
from energyreg.randomness import RandomSource
from energyreg.vision.boxes.energy import BoxEnergyHead
from energyreg.vision.boxes.postprocessing import Inference
from energyreg.vision.detection.adapter import check_detector, classes_of, declared_classes, interface, probe
from energyreg.vision.detection.detector import EnergyDetector, add_energy_head

__all__ = ["load_head", "save_head"]

MOST = 100_000
"""Steps or samples that a file may ask for."""


class _Head(TypedDict):
    class_specific: bool
    pool_size: int
    width: int


class _Inference(TypedDict):
    num_steps: int
    step_size: tuple[float, float]
    decay: float
    num_samples: int
    box_samples: int
    iou_thresholds: tuple[float, ...]
    rescore: bool
    noise: dict[str, Any]


class _State(TypedDict):
    """What a file holds besides the weights."""

    detector: dict[str, Any]
    backbone: str
    head: _Head
    inference: _Inference


def save_head(model: EnergyDetector, path: str | os.PathLike[str]) -> Path:
    """Write the energy head to one safetensors file: its weights, its sizes, and what is done with detected boxes.

    The detector is not in it: save that as you always do. The file remembers what feature maps and classes it has, and
    a checksum of its backbone. A checksum over the whole file detects damage; nothing in it is ever run.

    Args:
        model: What :func:`add_energy_head` made.
        path: File to write. The suffix ``.safetensors`` is appended where it is missing; missing folders are created.

    Returns:
        The path of the file, with its suffix.

    Raises:
        TypeError: model is no such module.
        OSError: The file cannot be written; an older one is intact.
    """
    if not isinstance(model, EnergyDetector):
        raise TypeError(f"model is a {type(model).__name__}; expected what add_energy_head() makes.")
    head, inference = model.head, model.inference
    settings = {each.name: getattr(inference, each.name) for each in fields(inference)}
    state = {
        "detector": interface(model.detector, model.num_classes),
        "backbone": fingerprint(model.detector.backbone),
        "head": {
            "class_specific": head.num_outputs > 1,
            "pool_size": head.pool_size,
            "width": head.fc6.out_features,
        },
        "inference": settings
        | {"noise": {each.name: getattr(inference.noise, each.name) for each in fields(inference.noise)}},
    }
    path = with_suffix(path)
    save_state(path, head.state_dict(), state, BOX_HEAD)
    return path


def load_head(
    detector: Any, path: str | os.PathLike[str], *, freeze: bool = True, objective: Any = None
) -> EnergyDetector:
    """Give a detector the energy head that :func:`save_head` wrote.

    Args:
        detector: The detector that the head was trained on, with its weights.
        path: File to read, with or without its suffix ``.safetensors``.
        freeze: As for :func:`add_energy_head`.
        objective: As for :func:`add_energy_head`; it is not in the file.

    Returns:
        As :func:`add_energy_head`, with the settings of inference of the saved model.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is no head's, is damaged, or is of a detector with other feature maps or classes.
        TypeError: As for :func:`add_energy_head`.
        ValueError: As for :func:`add_energy_head`.

    Warns:
        UserWarning: The backbone has other weights than the one that the head was trained on.
    """
    check_detector(detector)
    path = with_suffix(path)
    tensors, state = load_state(path, BOX_HEAD)
    with reading(path):
        check_type("state", state, _State)
        wanted, settings = state["detector"], state["inference"]
        sizes = {name: state["head"][name] for name in _Head.__annotations__}
        inference = Inference(**{**settings, "noise": GaussianNoise(**settings["noise"])})
        if max(inference.num_steps, inference.num_samples, inference.box_samples) > MOST:
            raise ValueError(f"inference asks for more than {MOST} steps or samples")
    classes = wanted.get("classes") if declared_classes(detector) is None else None
    for name, value in interface(detector, classes).items():
        if wanted.get(name) != value:
            raise CheckpointError(
                f"Cannot load {str(path)!r}: it is the head of a detector with {name} = {wanted.get(name)}, but this "
                f"detector has {name} = {value}. Build the detector as it was when the head was saved."
            )
    channels, outputs = probe(detector)[1], classes_of(detector, classes)[0] if sizes.pop("class_specific") else 1
    with reading(path):
        check_sizes(lambda: BoxEnergyHead(channels, outputs, **sizes), tensors)
    # New layers draw initial weights.
    with RandomSource(0).everywhere():
        model = add_energy_head(
            detector, num_classes=classes, freeze=freeze, inference=inference, objective=objective,
            class_specific=state["head"]["class_specific"], **sizes,
        )  # fmt: skip
    try:
        model.head.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"Cannot load {str(path)!r}: its weights are of another head ({error}).") from None
    if state.get("backbone") != fingerprint(detector.backbone):
        warnings.warn(
            f"{path} was saved with other weights of the detector's backbone. The head reads its feature maps, so that "
            "its energies mean nothing on others; load the weights of the detector before the head.",
            stacklevel=2,
        )
    return model
