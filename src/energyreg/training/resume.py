"""Checkpoints of a training: written after each epoch, and read to go on exactly."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from energyreg.checks import check_type
from energyreg.models import checkpoint
from energyreg.training.devices import scaler_state
from energyreg.training.history import History

if TYPE_CHECKING:
    from energyreg.training.loop import Training

LAST = "last.safetensors"


def conditions(training: Training) -> dict[str, Any]:
    """What must be the same in a resumed run."""
    objective = training.job.objective
    return {
        **training.settings.conditions(),
        "objective": repr(objective) if dataclasses.is_dataclass(objective) else type(objective).__qualname__,
        "number of processes": training.fabric.world_size,
        "number of members": training.job.num_members,
        "validation data": None if training.job.data.validation is None else training.job.data.validation.describe(),
        "training data": training.job.data.training.describe(),
    }


class _State(TypedDict):
    """What a checkpoint holds besides tensors."""

    conditions: dict[str, Any]
    epoch: int
    finished: bool
    first_losses: list[float | None]
    histories: list[History]
    optimizer: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any]
    precision: dict[str, Any]


def save(training: Training) -> None:
    """Write a checkpoint of an epoch's end, if there is a folder for it."""
    if training.job.folder is None or not training.fabric.is_global_zero:
        return
    optimizer = training.raw_optimizer.state_dict()
    tensors = {f"model.{name}": value for name, value in training.model.state_dict().items()}
    if training.histories[0].best_epoch is not None and not training.finished:
        tensors |= {f"best.{name}": value for name, value in training.kept.items()}
    tensors |= {f"average.{name}": value for name, value in training.average.items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in optimizer["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    state = {
        "conditions": conditions(training),
        "epoch": training.epoch,
        "finished": training.finished,
        "first_losses": training.watch.first_losses,
        "histories": [history.to_dict() for history in training.histories],
        "optimizer": plain,
        "groups": optimizer["param_groups"],
        "scheduler": training.scheduler.state_dict(),
        "precision": scaler_state(training.fabric),
    }
    try:
        checkpoint.save_training_state(training.job.folder / LAST, tensors, state)
    except OSError as error:
        # Hours of training weigh more than the means to resume it.
        if not training.warned:
            warnings.warn(f"{error}. Training goes on; its last checkpoint is that of an earlier epoch.", stacklevel=2)
        training.warned = True


def resume(training: Training, path: Path) -> None:
    """Go back to a checkpoint, if there is one.

    Raises:
        CheckpointError: It is damaged, or of another training.
    """
    if training.fabric.broadcast(path.exists()):
        with checkpoint.reading(path):
            _restore(training, path)


def _restore(training: Training, path: Path) -> None:
    """Set all that a checkpoint holds."""
    tensors, state = checkpoint.load_training_state(path)
    check_type("state", state, _State, finite=False)
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    mine = {name: tuple(value.shape) for name, value in training.model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    found = [*differences(state["conditions"], conditions(training)), *differences(theirs, mine, "the model's ")]
    if found:
        shown = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
        raise checkpoint.CheckpointError(
            f"Cannot resume from {str(path)!r}, which comes from another training: {shown}. Use the same settings "
            "and data, or another checkpoint_dir, or resume=False to start afresh."
        )
    training.model.load_state_dict(weights)
    training.epoch, training.finished, training.watch.first_losses = (
        state["epoch"],
        state["finished"],
        state["first_losses"],
    )
    training.histories = [History(**history) for history in state["histories"]]
    training.earlier_seconds = training.histories[0].total_seconds
    for name, value in training.average.items():
        value.copy_(tensors[f"average.{name}"])
    best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
    with training.averaged():
        training.kept = {
            name: training.fabric.to_device(value) for name, value in best.items()
        } or training.copy_weights()
    entries: dict[int, dict[str, Any]] = {int(index): dict(value) for index, value in state["optimizer"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            entries.setdefault(int(index), {})[key] = value
    training.raw_optimizer.load_state_dict({"state": entries, "param_groups": state["groups"]})
    # A file knows no memory format, and the fused kernel goes through weights and moments in the order of memory.
    for parameter, moments in training.raw_optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    training.scheduler.load_state_dict(state["scheduler"])
    if state["precision"]:
        training.fabric.strategy.precision.load_state_dict(state["precision"])


def differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Say in words what is different."""
    for name in dict.fromkeys([*then, *now]):
        a, b = then.get(name), now.get(name)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield next(differences(a, b, f"{name}: "))  # the others follow from the first
        elif name == "content":
            yield f"{prefix}the values are others"
        else:
            yield f"{prefix}{name} was {_brief(a)}, is {_brief(b)}"


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a DataLoader" if "batches" in value else "arrays"
    return repr(value)
