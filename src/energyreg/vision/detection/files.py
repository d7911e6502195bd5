"""An energy head in a file."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from energyreg.densities.noise import GaussianNoise
from energyreg.files import BOX_HEAD, CheckpointError, fingerprint, with_suffix
from energyreg.models.checkpoint import load_state, save_state
from energyreg.vision.boxes.postprocessing import Inference
from energyreg.vision.detection.adapter import check_detector, declared_classes, interface
from energyreg.vision.detection.detector import EnergyDetector, add_energy_head

__all__ = ["load_head", "save_head"]


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
    try:
        wanted = state["detector"]
        sizes = {name: state["head"][name] for name in ("class_specific", "pool_size", "width")}
        settings = state["inference"]
        inference = Inference(**{**settings, "noise": GaussianNoise(**settings["noise"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"Cannot load {str(path)!r}: its description cannot be read ({error!r}).") from None
    classes = wanted.get("classes") if declared_classes(detector) is None else None
    for name, value in interface(detector, classes).items():
        if wanted.get(name) != value:
            raise CheckpointError(
                f"Cannot load {str(path)!r}: it is the head of a detector with {name} = {wanted.get(name)}, but this "
                f"detector has {name} = {value}. Build the detector as it was when the head was saved."
            )
    # New layers draw initial weights; the caller's random state is none of their business.
    with torch.random.fork_rng(devices=[]):
        model = add_energy_head(
            detector, num_classes=classes, freeze=freeze, inference=inference, objective=objective, **sizes
        )
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
