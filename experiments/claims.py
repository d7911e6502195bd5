"""Pieces of work that several processes share: each is claimed, and done once."""

from __future__ import annotations

import fcntl
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from energyreg.files import write_atomically

__all__ = ["claim", "do_each", "in_processes"]

Piece = TypeVar("Piece")


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process has the claim. The lock goes with the process, so that a killed one leaves no claim."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def do_each(
    pieces: Iterable[Piece],
    path_of: Callable[[Piece], Path],
    name_of: Callable[[Piece], str],
    do: Callable[[Piece], tuple[str, str]],
) -> bool:
    """Do all that is not done and that no other process is doing; return whether nothing went wrong.

    Args:
        pieces: The work, in order.
        path_of: File of a piece's result.
        name_of: What is printed of it.
        do: Makes the content of that file, and a summary of it for the line that is printed.
    """
    well = True
    for piece in pieces:
        path = path_of(piece)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with claim(path.with_suffix(".lock")) as claimed:
            if not claimed or path.exists():
                continue
            started = time.perf_counter()
            try:
                content, summary = do(piece)
            except Exception:
                print(f"{name_of(piece)} failed", flush=True)
                traceback.print_exc()
                well = False
                continue
            write_atomically(path, content.encode())
            print(f"{name_of(piece)}: {summary} ({time.perf_counter() - started:.0f} s)", flush=True)
    return well


def in_processes(work: Callable[[], bool], jobs: int) -> bool:
    """Do the same work in several processes, which share it by claims; return whether all went well.

    Args:
        work: What each does; it returns whether nothing went wrong.
        jobs: Processes; 1 for this one.
    """
    if jobs == 1:
        return work()
    context = multiprocessing.get_context("fork")  # pieces hold functions that cannot be sent to another process
    workers = [context.Process(target=_exit, args=(work,)) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return all(worker.exitcode == 0 for worker in workers)


def _exit(work: Callable[[], bool]) -> None:
    raise SystemExit(0 if work() else 1)
