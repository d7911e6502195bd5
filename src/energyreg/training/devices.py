"""Where a training runs: Lightning Fabric, made so that a wrong argument is named."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

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


class OneProcessor:
    """What a training asks of Fabric where it runs in this process, on the processor, in full precision.

    There is nothing to distribute, move or cast then, and Fabric's import takes more memory than many trainings: it
    brings torchmetrics and whatever that finds installed.
    """

    device = torch.device("cpu")
    world_size = 1
    global_rank = 0
    is_global_zero = True

    def to_device(self, value: Any) -> Any:
        """A module or tensor on the processor."""
        return value.to(self.device)

    def setup(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both as they are."""
        return module, optimizer

    def broadcast(self, value: Any) -> Any:
        """The value, which no other process needs."""
        return value

    def launch(self, function: Callable[[Any], Any]) -> Any:
        """Call the function here."""
        return function(self)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""
        loss.backward()

    def clip_gradients(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, *, max_norm: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Limit the norm of all gradients, and return what it was."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, max_norm=max_norm, error_if_nonfinite=error_if_nonfinite)


def needs_fabric(accelerator: Any, devices: Any, settings: TrainingSettings) -> bool:
    """Whether a training on tensors in memory asks more than `OneProcessor` has."""
    plain = accelerator == "cpu" and settings.precision == "32-true" and settings.strategy == "auto"
    launched = any(name.startswith("LT_") for name in os.environ)  # by Fabric's command, which sets these
    return not plain or launched or isinstance(devices, bool) or devices not in (1, "1")


def scaler_state(fabric: Any) -> dict[str, Any]:
    """State of the loss scale of a training in half precision, empty for any other."""
    return {} if isinstance(fabric, OneProcessor) else fabric.strategy.precision.state_dict()


def make_fabric(
    accelerator: Any,
    devices: Any,
    settings: TrainingSettings,
    find_unused_parameters: bool | None = None,
    *,
    in_memory: bool = True,
) -> Fabric:
    """Fabric for an accelerator and devices.

    Args:
        accelerator: As in `fit`.
        devices: As in `fit`.
        settings: Precision and strategy.
        find_unused_parameters: For a DDP strategy given by its name; None where it does not matter yet.
        in_memory: Whether the data are tensors, and no DataLoader, which Fabric prepares.

    Raises:
        ValueError: If one of them cannot be used.
    """
    if in_memory and not needs_fabric(accelerator, devices, settings):
        return cast("Fabric", OneProcessor())
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
