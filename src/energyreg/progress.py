"""Progress of long work: a bar on a terminal, lines now and then elsewhere, or nothing."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, Protocol

__all__ = ["TrainingProgress", "duration"]


class Epochs(Protocol):
    """What the bar reads of a history of training."""

    train_loss: list[float]
    validation_nll: list[float]
    best_epoch: int | None
    stopped_early: bool

    @property
    def best_validation_nll(self) -> float | None: ...


class TrainingProgress:
    """Progress of a training, step by step: a bar on a terminal, lines now and then elsewhere, or nothing."""

    SECONDS_PER_LINE = 10.0
    SECONDS_PER_FRAME = 0.1

    def __init__(self, wanted: bool | None, epochs: int, steps: int) -> None:
        self.epochs, self.steps = epochs, steps
        self.bar: Any = None
        self.lines = False
        self.first = 0
        self.started = self.shown = time.perf_counter()
        self.validation = ""
        if wanted is False:
            return
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal or console.is_jupyter:
            from rich.progress import BarColumn, Progress, TextColumn

            # Drawn by hand: a thread that draws would take time from the training.
            self.bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
                console=console,
                auto_refresh=False,
            )
        else:
            self.lines = wanted is True

    def start(self, epoch: int) -> None:
        self.first = epoch
        self.started = self.shown = time.perf_counter()
        if self.bar is not None:
            self.bar.start()
            total = self.epochs * self.steps
            self.task = self.bar.add_task("", total=total, epoch=f"{epoch + 1}/{self.epochs}", status="")

    def step(self, epoch: int, done: int, loss: float) -> None:
        if self.bar is None and not self.lines:
            return
        now = time.perf_counter()
        if now - self.shown < (self.SECONDS_PER_FRAME if self.bar is not None else 6 * self.SECONDS_PER_LINE):
            return
        self._show(epoch, done, loss, now)

    def epoch(self, epoch: int, history: Epochs) -> None:
        if self.bar is None and not self.lines:
            return
        if history.validation_nll:
            self.validation = (
                f" · validation NLL {history.validation_nll[-1]:.4f} (best {history.best_validation_nll:.4f} in epoch "
                f"{history.best_epoch})"
                if history.best_epoch is not None
                else f" · validation NLL {history.validation_nll[-1]:.4f}"
            )
        now = time.perf_counter()
        last = epoch == self.epochs or history.stopped_early
        often_enough = epoch % max(1, self.epochs // 10) == 0 or now - self.shown >= self.SECONDS_PER_LINE
        if self.bar is not None or last or epoch == self.first + 1 or often_enough:
            self._show(epoch - 1, self.steps, history.train_loss[-1], now)

    def _show(self, epoch: int, done: int, loss: float, now: float) -> None:
        self.shown = now
        steps = epoch * self.steps + done
        share = (steps - self.first * self.steps) / max(1, (self.epochs - self.first) * self.steps)
        remaining = (now - self.started) * (1 / share - 1) if share > 0 else math.nan
        status = f"loss {loss:.4f}{self.validation} · {duration(remaining)} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=steps, epoch=f"{epoch + 1}/{self.epochs}", status=status)
            self.bar.refresh()
        else:
            within = "" if done == self.steps else f", step {done}/{self.steps}"
            print(f"epoch {epoch + 1}/{self.epochs}{within} · {status}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def duration(seconds: float) -> str:
    """A number of seconds in words, such as 2 min 05 s."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
