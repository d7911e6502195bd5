"""Memory that `EnergyRegressor` needs for a million rows, from an array, a mapped array and a Parquet file.

Counted is what the process cannot give back: anonymous memory (RssAnon). Pages of mapped files are not, as the system
drops them where memory is short.
"""

from __future__ import annotations

import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.children import call
from benchmarks.memory import MIB, _require_linux, _status
from benchmarks.rows import Benchmark, Measurement, Options
from energyreg.estimators.table import EnergyRegressor

__all__ = ["BENCHMARKS", "fit_peak"]

FEATURES = 10
ROWS_AT_ONCE = 100_000
LIMIT = 256
"""MiB above the table itself that `fit` may take."""


class _Peak:
    """The most anonymous memory while it runs, looked at every two milliseconds."""

    def __enter__(self) -> _Peak:
        self.bytes, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, _status("RssAnon"))

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()
        self.bytes = max(self.bytes, _status("RssAnon"))


def _blocks(rows: int) -> Any:
    rng = np.random.default_rng(0)
    for start in range(0, rows, ROWS_AT_ONCE):
        x = rng.standard_normal((min(ROWS_AT_ONCE, rows - start), FEATURES), dtype=np.float32)
        yield start, x, x[:, 0] + 0.3 * rng.standard_normal(len(x), dtype=np.float32)


def fit_peak(kind: str, rows: int) -> dict[str, float]:
    """Bytes at the peak of a fit above those with the table, and its seconds.

    One member of the default width makes one pass in large batches, which takes the memory of any other training.

    Args:
        kind: "array", "memmap" or "parquet".
        rows: Rows of the table.
    """
    regressor = EnergyRegressor(n_members=1, epochs=1, batch_size=2048, random_state=0)
    _, x, y = next(_blocks(2000))
    EnergyRegressor(n_members=1, epochs=1, width=16, random_state=0).fit(x, y)  # what is loaded once
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / kind
        if kind == "parquet":
            import pandas
            import pyarrow
            from pyarrow import parquet

            path = path.with_suffix(".parquet")
            writer = None
            for _, x, y in _blocks(rows):
                frame = pandas.DataFrame(x, columns=[f"x{i}" for i in range(FEATURES)]).assign(y=y)
                table = pyarrow.Table.from_pandas(frame, preserve_index=False)
                writer = writer or parquet.ParquetWriter(path, table.schema)
                writer.write_table(table)
            assert writer is not None
            writer.close()
            pandas.read_parquet(path, columns=["y"])  # what is loaded once
        else:
            table = (
                np.empty((rows, FEATURES), np.float32)
                if kind == "array"
                else np.memmap(path, np.float32, "w+", shape=(rows, FEATURES))
            )
            targets = np.empty(rows, np.float32)
            for start, x, y in _blocks(rows):
                table[start : start + len(x)], targets[start : start + len(y)] = x, y
        before, started = _status("RssAnon"), time.perf_counter()
        with _Peak() as peak:
            if kind == "parquet":
                regressor.fit_file(path, "y")
            else:
                regressor.fit(table, targets)
        seconds = time.perf_counter() - started
    return {"peak": peak.bytes - before, "seconds": seconds}


def _fit(kind: str, options: Options) -> Measurement:
    _require_linux()
    rows = options.size(1_000_000, quick=100_000, tiny=256)
    found = call("benchmarks.large_data", "fit_peak", kind, rows, threads=torch.get_num_threads())
    details = {"rows": rows, "features as float32": f"{rows * FEATURES * 4 / MIB:.0f} MiB"}
    return Measurement(found["peak"] / MIB, seconds={"fit": found["seconds"]}, details=details)


BENCHMARKS = [
    Benchmark(
        f"large-data-{kind}", f"`EnergyRegressor.{call_of}` of 1,000,000 rows, 10 columns, above the table",
        f"≤ {LIMIT} MiB", partial(_fit, kind), LIMIT, format="{:.0f} MiB", once=True, long=True,
    )
    for kind, call_of in (("array", "fit"), ("memmap", "fit"), ("parquet", "fit_file"))
]  # fmt: skip
