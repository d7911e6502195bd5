"""Where a training runs: Lightning Fabric, made so that a wrong argument is named."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from energyreg.training.settings import TrainingSettings
from energyreg.training.trainable import Trainable

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def device_of(model: Trainable, settings: TrainingSettings) -> tuple[Any, Any]:
    """Accelerator and devices for Fabric: those of the settings, or where the model is."""
    accelerator, devices = settings.accelerator, settings.devices
    if accelerator is not None:
        return accelerator, devices
    device = next(model.parameters()).device
    index_matters = device.index is not None and devices == 1 and not isinstance(devices, bool)
    return device.type, [device.index] if index_matters else devices


def make_fabric(
    accelerator: Any, devices: Any, settings: TrainingSettings, find_unused_parameters: bool | None = None
) -> Fabric:
    """Fabric for an accelerator and devices.

    Args:
        accelerator: As in `fit`.
        devices: As in `fit`.
        settings: Precision and strategy.
        find_unused_parameters: For a DDP strategy given by its name; None where it does not matter yet.

    Raises:
        ValueError: If one of them cannot be used.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    arguments: dict[str, Any] = {
        "accelerator": accelerator,
        "devices": devices,
        "precision": settings.precision,
        "strategy": settings.strategy,
    }
    strategy = settings.strategy
    with quiet_fabric():
        try:
            fabric = Fabric(**arguments)
        except Exception as error:
            culprit = _culprit(arguments)
            raise ValueError(f"{culprit} cannot be used: {error}") from error
        if fabric.device.type == "mps":
            raise ValueError(
                f"accelerator={accelerator!r} means Apple's GPU here, which has no float64; pass accelerator='cpu'."
            )
        if find_unused_parameters and isinstance(strategy, str) and isinstance(fabric.strategy, DDPStrategy):
            notebook = fabric.strategy.launcher is not None and fabric.strategy.launcher.is_interactive_compatible
            method: Any = {"ddp_spawn": "spawn"}.get(strategy, "fork" if notebook else "popen")
            arguments["strategy"] = DDPStrategy(start_method=method, find_unused_parameters=True)
            fabric = Fabric(**arguments)
    return fabric


def _culprit(arguments: dict[str, Any]) -> str:
    """The argument that Fabric refuses by itself, or all of them."""
    from lightning_fabric import Fabric

    alone: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "strategy": "auto"}
    tried = dict(alone)
    for name in ("accelerator", "precision", "devices", "strategy"):
        tried[name] = arguments[name]
        try:
            Fabric(**tried)
        except Exception:
            return f"{name}={arguments[name]!r}"
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


@contextlib.contextmanager
def quiet_fabric() -> Iterator[None]:
    """Silence what Fabric says of itself."""
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning_(fabric|utilities)")
            yield
    finally:
        logger.setLevel(level)
