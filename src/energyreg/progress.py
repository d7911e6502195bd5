"""Long work: its progress (a bar on a terminal, lines now and then elsewhere, or nothing), and its end by SIGTERM."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

__all__ = ["Progress", "TrainingProgress", "duration", "terminated_as_interrupted"]

SECONDS_PER_LINE = 10.0
"""Time between two lines where there is no terminal."""
SECONDS_PER_FRAME = 0.1
"""Time between two drawings of a bar."""


class Progress:
    """Progress of things that are counted: a bar on a terminal, lines now and then elsewhere, or nothing; on stderr.

    >>> with Progress("Scoring", "rows", total=100, wanted=False) as progress:
    ...     progress(60)
    >>> progress.done
    60

    Args:
        title: What is done, such as "Scoring".
        unit: What is counted, such as "rows".
        total: How many there are, at least roughly; 0 where nobody knows.
        wanted: True for a bar, or lines where there is no terminal; None for a bar on a terminal only; False for
            silence.
        done: How many are done before it starts.
        transient: Whether nothing stays at the end: the bar vanishes, and no line is printed.
    """

    def __init__(
        self, title: str, unit: str, total: int, wanted: bool | None, *, done: int = 0, transient: bool = False
    ) -> None:
        self.title, self.unit, self.total, self.wanted = title, unit, total, wanted
        self.done, self.transient = done, transient
        self.known = done
        self.bar: Any = None
        self.lines = False
        self.started = self.shown = time.perf_counter()

    def start(self) -> None:
        """Start the clock, and draw the bar."""
        self.known = self.done
        self.started = self.shown = time.perf_counter()
        if self.wanted is False:
            return
        forced = {"FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"} & set(os.environ)
        if not (sys.stderr.isatty() or forced or "ipykernel" in sys.modules):
            self.lines = self.wanted is True  # without an import of rich, which draws from the caller's `random`
            return
        from rich.console import Console

        console = Console(stderr=True)
        if not (console.is_terminal or console.is_jupyter):
            self.lines = self.wanted is True
            return
        from rich import progress as rich

        # Drawn by hand: a thread that draws would take time from the work.
        self.bar = rich.Progress(
            rich.TextColumn("{task.description}"), rich.BarColumn(bar_width=24),
            rich.TextColumn("{task.fields[status]}"), console=console, auto_refresh=False, transient=self.transient,
        )  # fmt: skip
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=self.total or None, completed=self.done, status="")

    def stop(self) -> None:
        """End the bar; once is enough."""
        if self.bar is not None:
            self.bar.stop()

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def __call__(self, count: int) -> None:
        """Count what was done, and show it if it is time."""
        self.done += count
        finished = self.done == self.total and not (self.transient and self.lines)
        if not self.due() and not (finished and self.visible):
            return
        rate = (self.done - self.known) / max(time.perf_counter() - self.started, 1e-9)
        of = f" of {max(self.done, self.total):,}" if self.total else ""
        left = f", {self.left} left" if self.total else ""
        self.show(f"{self.done:,}{of} {self.unit}, {rate:.3g} a second{left}", separator=": ")

    @property
    def visible(self) -> bool:
        """Whether anything is shown."""
        return self.bar is not None or self.lines

    @property
    def left(self) -> str:
        """The time left, in words, by the mean speed so far."""
        passed, rest = self.done - self.known, max(self.total - self.done, 0)
        return duration((time.perf_counter() - self.started) * rest / passed if passed else math.nan)

    def due(self, seconds: float = SECONDS_PER_LINE) -> bool:
        """Whether the last line is so many seconds ago, or the bar due to be drawn again."""
        wait = seconds if self.bar is None else SECONDS_PER_FRAME
        return self.visible and time.perf_counter() - self.shown >= wait

    def show(self, status: str, separator: str = " · ") -> None:
        """Draw the bar again, or print a line."""
        self.shown = time.perf_counter()
        if self.bar is not None:
            completed = min(self.done, self.total) if self.total else self.done
            self.bar.update(self.task, completed=completed, description=self.title, status=status, refresh=True)
        elif self.lines:
            print(f"{self.title}{separator}{status}", file=sys.stderr, flush=True)


class Epochs(Protocol):
    """What the progress of a training reads of its history."""

    train_loss: list[float]
    validation_nll: list[float]
    best_epoch: int | None
    stopped_early: bool

    @property
    def best_validation_nll(self) -> float | None: ...


class TrainingProgress(Progress):
    """Progress of a training, step by step, with its losses.

    Args:
        wanted: As of :class:`Progress`.
        epochs: How many there are.
        steps: How many an epoch has.
    """

    def __init__(self, wanted: bool | None, epochs: int, steps: int) -> None:
        super().__init__("", "steps", epochs * steps, wanted)
        self.epochs, self.steps = epochs, steps
        self.validation = ""

    def start(self, epoch: int = 0) -> None:
        """Start with this epoch, counted from 0."""
        self.done, self.title = epoch * self.steps, f"epoch {epoch + 1}/{self.epochs}"
        super().start()

    def step(self, epoch: int, done: int, loss: float) -> None:
        """Show the loss of the latest steps if it is time; `done` steps of the epoch are over."""
        if self.due(6 * SECONDS_PER_LINE):
            self._show_loss(epoch, done, loss)

    def epoch(self, epoch: int, history: Epochs) -> None:
        """Show the end of an epoch, counted from 1, if it is time."""
        if not self.visible:
            return
        if history.validation_nll:
            self.validation = f" · validation NLL {history.validation_nll[-1]:.4f}"
            if history.best_epoch is not None:
                self.validation += f" (best {history.best_validation_nll:.4f} in epoch {history.best_epoch})"
        first, last = epoch == self.known // self.steps + 1, epoch == self.epochs or history.stopped_early
        if self.bar is not None or first or last or epoch % max(1, self.epochs // 10) == 0 or self.due():
            self._show_loss(epoch - 1, self.steps, history.train_loss[-1])

    def _show_loss(self, epoch: int, done: int, loss: float) -> None:
        self.done = epoch * self.steps + done
        self.title = f"epoch {epoch + 1}/{self.epochs}"
        within = "" if done == self.steps or self.bar is not None else f", step {done}/{self.steps}"
        self.show(f"loss {loss:.4f}{self.validation} · {self.left} left", separator=f"{within} · ")


def duration(seconds: float) -> str:
    """A number of seconds in words, such as 2 min 05 s."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Lets SIGTERM end the work as Ctrl-C does, unless the caller has a handler, or works in a thread."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
