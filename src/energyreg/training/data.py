"""What a training reads: rows in memory or a DataLoader, checked once, and the batches of a step."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from energyreg.randomness import mix, redirected_items
from energyreg.training.settings import ORDER, SPLIT, SUBSET
from energyreg.training.step import Batch
from energyreg.training.trainable import Trainable

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LARGEST_BATCH = 256
"""Rows per step by default, where there are enough of them."""
PREPROCESSING_ROWS = 200_000
"""Rows that the units of x are fitted to, at most: more would cost memory, and change no quantile that matters."""
PREPROCESSING_BYTES = 2**24
"""Their size in float64, at most; but 20,000 rows in any case."""


class Data(Protocol):
    """What the loop asks of rows and loaders."""

    def num_batches(self) -> int: ...

    def place(self, fabric: Fabric, dtype: torch.dtype) -> None: ...

    def batches(self, epoch: int, seeds: Sequence[int], fabric: Fabric) -> Iterator[Batch]: ...

    def pairs(self, fabric: Fabric, chunk: int) -> Iterator[tuple[Any, Tensor, Tensor | None]]: ...

    def describe(self) -> dict[str, Any]: ...

    def sample(self) -> tuple[Any, Tensor]: ...


class Rows:
    """Data in memory: batches are index lookups.

    The members of an ensemble take the rows each in an order of its own, that of a training with its own seed.

    Args:
        x: Inputs, shape (N, ...); they may be mapped from a file, as they are never copied as a whole on the CPU.
        y: Targets, shape (N, D).
        rows: Row numbers in the caller's data.
        batch_size: Rows of a step.
        weights: Weights of the rows, shape (N,), all > 0; they are divided by their mean. None for equal ones.
    """

    def __init__(
        self, x: Tensor, y: Tensor, rows: Tensor | None, batch_size: int, weights: Tensor | None = None
    ) -> None:
        self.x, self.y = x, y
        self.rows = torch.arange(len(y)) if rows is None else rows
        self.batch_size = min(batch_size, len(y))
        # Equal weights change nothing, not even the last digit.
        equal = weights is None or bool((weights == weights[0]).all())
        self.weights = None if weights is None or equal else weights / weights.mean()
        self.description: dict[str, Any] | None = None

    def num_batches(self) -> int:
        return len(self.y) // self.batch_size

    def place(self, fabric: Fabric, dtype: torch.dtype) -> None:
        x, y = self.x.to(dtype) if self.x.is_floating_point() else self.x, self.y
        # All at once where it fits with ease; then no step waits for a transfer.
        if fabric.device.type != "cuda" or x.nbytes + y.nbytes < torch.cuda.mem_get_info(fabric.device)[0] // 4:
            x, y = fabric.to_device(x), fabric.to_device(y)
        self.x, self.y = x, y
        self.weights = None if self.weights is None else self.weights.to(y.device)

    def batches(self, epoch: int, seeds: Sequence[int], fabric: Fabric) -> Iterator[Batch]:
        shuffles = [torch.Generator().manual_seed(mix(seed, ORDER, epoch)) for seed in seeds]
        orders = [torch.randperm(len(self.y), generator=shuffle) for shuffle in shuffles]
        order = torch.stack(orders)
        world, share = fabric.world_size, fabric.world_size / self.batch_size
        index = order.to(self.x.device)
        there = self.x.device == fabric.device
        for start in range(0, self.num_batches() * self.batch_size, self.batch_size):
            rows = slice(start + fabric.global_rank, start + self.batch_size, world)
            chosen = index[:, rows].flatten()
            x, y = self.x.index_select(0, chosen), self.y.index_select(0, chosen)
            shares = share if self.weights is None else self.weights.index_select(0, chosen) * share
            if not there:
                x, y, shares = fabric.to_device(x), fabric.to_device(y), fabric.to_device(shares)
            yield Batch(x, y, shares, order[:, rows].flatten())

    def pairs(self, fabric: Fabric, chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        mine = range(fabric.global_rank, len(self.y), fabric.world_size)
        for start in range(0, len(mine), chunk):
            part = mine[start : start + chunk]
            rows = slice(part.start, part.stop, part.step)
            weights = None if self.weights is None else self.weights[rows]
            yield fabric.to_device(self.x[rows]), fabric.to_device(self.y[rows]), weights

    def describe(self) -> dict[str, Any]:
        if self.description is None:
            content = [_fingerprint(tensor) for tensor in (self.x, self.y, self.weights) if tensor is not None]
            self.description = {
                "rows": len(self.y), "x": _shape(self.x), "y": _shape(self.y), "content": "".join(content),
            }  # fmt: skip
        return self.description

    def sample(self) -> tuple[Tensor, Tensor]:
        return self.x[:8], self.y[:8]


class Loader:
    """Data from a DataLoader, checked pair by pair.

    Args:
        loader: The DataLoader.
        name: What errors call it.
        collates: Whether the model has a `collate` that errors should name.
    """

    def __init__(self, loader: DataLoader[Any], name: str, collates: bool = False) -> None:
        self.loader, self.name = loader, name
        self.hint = " Make the DataLoader with collate_fn=model.collate." if collates else ""
        self.prepared: Any = loader
        self.dtype = torch.float32
        self.count: int | None = None
        with contextlib.suppress(TypeError):  # an iterable dataset without a length
            self.count = len(loader)
        if self.count == 0:
            raise ValueError(
                f"{name} is a DataLoader without a batch: its dataset is empty, or drop_last drops all of it."
            )

    def num_batches(self) -> int:
        if self.count is None:
            self.count = sum(1 for _ in redirected_items(self.loader))
        return self.count

    def place(self, fabric: Fabric, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.prepared = fabric.setup_dataloaders(self.loader)
        if fabric.world_size > 1:
            self.count = len(self.prepared)

    def batches(self, epoch: int, seeds: Sequence[int], fabric: Fabric) -> Iterator[Batch]:
        # Fabric hands this number to a distributed sampler; a resumed run must not start counting from 0.
        self.prepared._num_iter_calls = epoch
        for number, batch in enumerate(islice(redirected_items(self.prepared), self.num_batches())):
            x, y = self.pair(batch, number)
            yield Batch(x, y, 1 / len(y), None)

    def pairs(self, fabric: Fabric, chunk: int) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        # Not by a distributed sampler, which counts rows twice to make all shares equal.
        for number, batch in enumerate(redirected_items(self.loader)):
            if number % fabric.world_size == fabric.global_rank:
                yield *self.pair(fabric.to_device(batch), number), None

    def pair(self, batch: Any, number: int) -> tuple[Any, Tensor]:
        where = f"Batch {number + 1} of the DataLoader {self.name}"
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise ValueError(
                f"{where} is a {type(batch).__name__}{length}; expected a pair (x, y) of tensors.{self.hint}"
            )
        x, y = (torch.as_tensor(part) if isinstance(part, np.ndarray) else part for part in batch)
        if not isinstance(y, Tensor) or y.ndim not in (1, 2) or y.is_complex() or y.dtype == torch.bool:
            found = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ValueError(
                f"{where} has y = {found}; expected a tensor of numbers of shape (B, D), or (B,) for D = 1.{self.hint}"
            )
        if len(y) == 0:
            raise ValueError(f"{where} has no rows.")
        if isinstance(x, Tensor):
            if x.ndim == 0 or len(x) != len(y):
                raise ValueError(
                    f"{where} has x of shape {tuple(x.shape)}, but y of shape {tuple(y.shape)}; rows differ."
                )
            x = x.to(self.dtype) if x.is_floating_point() else x
        return x, y[:, None] if y.ndim == 1 else y

    def describe(self) -> dict[str, Any]:
        return {"batches": self.num_batches(), "loader's batch_size": self.loader.batch_size}

    def sample(self) -> tuple[Any, Tensor]:
        return self.pair(next(iter(self.loader)), 0)


@dataclass(frozen=True)
class Examples:
    """What the caller of `fit` gave to learn from; see there."""

    x: Any
    y: Any = None
    sample_weight: Any = None
    validation: Any = "auto"


@dataclass(frozen=True)
class TrainingData:
    """What a training reads, checked.

    Attributes:
        training: What is learned from.
        validation: What the epochs are judged by; None for nothing.
        units: Inputs (None if they are not needed) and targets that the preprocessing is to be fitted to; None where
            the model is fitted.
        batch_size: Rows of a step; of a DataLoader the default, as it has its own.
    """

    training: Rows | Loader
    validation: Rows | Loader | None
    units: tuple[Tensor | None, Tensor] | None
    batch_size: int

    @property
    def in_memory(self) -> bool:
        """Whether there are tensors, and no DataLoader."""
        return not isinstance(self.training, Loader) and not isinstance(self.validation, Loader)

    def check_processes(self, world_size: int) -> None:
        """Refuse data that so many processes cannot share."""
        data = self.training
        if isinstance(data, Rows):
            if data.batch_size < world_size:
                raise ValueError(
                    f"A batch has {data.batch_size} rows, which {world_size} processes cannot share; use fewer devices."
                )
        elif isinstance(data.loader.dataset, IterableDataset):
            raise ValueError(
                "x is a DataLoader over an IterableDataset, which every process would read from start to end. Use one "
                "device, or a dataset with indices."
            )


def prepare(model: Trainable, examples: Examples, batch_size: int | None, seed: int) -> TrainingData:
    """Check examples, hold rows out, and say what the preprocessing is to be fitted to.

    Raises:
        ValueError: If they cannot be used.
    """
    x, y, validation = examples.x, examples.y, examples.validation
    weights = checked_weights(examples.sample_weight, x, y)
    if batch_size is None:
        batch_size = default_batch_size(y if weights is None else weights[weights > 0])
    if isinstance(x, DataLoader):
        return _prepare_loader(model, x, y, validation, batch_size)
    if y is None:
        raise ValueError(f"y is missing: x is a {type(x).__name__}. Only a DataLoader brings y along.")
    if isinstance(y, DataLoader):
        raise ValueError("y is a DataLoader; pass one DataLoader as x that yields pairs (x, y), or arrays for both.")
    x, y = _checked_pair(model, x, y, "x", "y")
    rows: Tensor | None = None
    if weights is not None and not bool((weights > 0).all()):
        rows = (weights > 0).nonzero()[:, 0]
        x, y, weights = x[rows], y[rows], weights[rows]
    if len(y) < 2:
        weighty = "" if weights is None else " with a weight above 0"
        raise ValueError(f"x has {len(y)} row{weighty}; expected at least 2 to learn from.")
    if isinstance(validation, str) and validation == "auto":
        validation = 0.1
    held_out: Rows | Loader | None = None
    if isinstance(validation, (int, float, np.number)) and not isinstance(validation, bool):
        kept, chosen = split(len(y), float(validation), seed)
        rows = torch.arange(len(y)) if rows is None else rows
        parts = [
            Rows(x[part], y[part], rows[part], batch_size, None if weights is None else weights[part])
            for part in (kept, chosen)
        ]
        data, held_out = parts
    else:
        held_out = _prepare_validation(model, validation, batch_size, x)
        data = Rows(x, y, rows, batch_size, weights)
    units = None if bool(model.fitted) else (_some_rows(data.x, seed), data.y)
    return TrainingData(data, held_out, units, batch_size)


def _some_rows(x: Tensor, seed: int) -> Tensor:
    """What the units of x are fitted to: all rows, or 200,000 of them at random (fewer if wide), which will do."""
    row_bytes = 8 * max(x[0].numel(), 1)
    most = min(PREPROCESSING_ROWS, max(PREPROCESSING_BYTES // row_bytes, 20_000))
    if len(x) <= most:
        return x
    generator = np.random.default_rng(mix(seed, SUBSET))
    chosen = np.sort(generator.choice(len(x), most, replace=False, shuffle=False))
    return x[torch.from_numpy(chosen)]


def default_batch_size(y: Any) -> int:
    """Few rows need small batches, or an epoch is too few steps to learn anything sharp."""
    rows = len(y) if hasattr(y, "__len__") and not isinstance(y, DataLoader) else None
    if rows is None or rows >= 25 * LARGEST_BATCH:
        return LARGEST_BATCH
    return max(2 ** int(math.log2(max(rows / 25, 1))), 32)


def split(n: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to hold out, in order, chosen at random by the seed."""
    if not 0 < fraction < 1:
        raise ValueError(
            f"validation is {fraction}; expected a fraction in (0, 1), (x_val, y_val), a DataLoader or None."
        )
    count = max(1, round(fraction * n))
    if n - count < 2:
        raise ValueError(
            f"validation={fraction} of {n} rows leaves {n - count} to train on; expected at least 2. Pass a smaller "
            "fraction, (x_val, y_val), or validation=None."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, SPLIT)))
    return order[count:].sort().values, order[:count].sort().values


def _prepare_validation(model: Trainable, validation: Any, batch_size: int, x: Any) -> Rows | Loader | None:
    if validation is None:
        return None
    if isinstance(validation, DataLoader):
        loader = Loader(validation, "validation", hasattr(model, "collate"))
        _check_first_batch(model, loader)
        return loader
    if not isinstance(validation, (tuple, list)) or len(validation) not in (2, 3):
        raise ValueError(
            f"validation is "
            f"{validation if isinstance(validation, (bool, str)) else 'a ' + type(validation).__name__!r}; expected a "
            "fraction in (0, 1), (x_val, y_val), a DataLoader or None."
        )
    x_val, y_val = _checked_pair(model, validation[0], validation[1], "x_val", "y_val")
    if isinstance(x, Tensor) and x_val.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"x_val has shape {tuple(x_val.shape)}, but x has shape {tuple(x.shape)}; expected the same but for the "
            "rows."
        )
    weights = checked_weights(validation[2], x_val, y_val, "The third of validation") if len(validation) == 3 else None
    if weights is None:
        return Rows(x_val, y_val, None, batch_size)
    kept = (weights > 0).nonzero()[:, 0]
    return Rows(x_val[kept], y_val[kept], kept, batch_size, weights[kept])


def _checked_pair(model: Trainable, x: Any, y: Any, x_name: str, y_name: str) -> tuple[Tensor, Tensor]:
    pair = []
    for value, name, check in ((x, x_name, model.check_inputs), (y, y_name, model.check_targets)):
        if not isinstance(value, Tensor):
            try:
                value = value.to_numpy() if hasattr(value, "to_numpy") else np.asarray(value)
            except ValueError as error:  # ragged lists
                raise ValueError(f"{name} is not an array of numbers: {error}") from None
            if value.dtype.kind not in "fiub":
                raise ValueError(
                    f"{name} has dtype {value.dtype}; expected numbers. Encode text and categories, fill missing "
                    f"values, and convert by {name}.astype(float)."
                )
        if value.ndim and len(value) == 0:
            raise ValueError(f"{name} is empty: its shape is {tuple(value.shape)}; expected at least one row.")
        try:
            pair.append(check(value))
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if not str(error).startswith(name) else str(error)) from error
    if len(pair[0]) != len(pair[1]):
        raise ValueError(
            f"{x_name} has {len(pair[0])} rows, but {y_name} has {len(pair[1])}; expected one target for each row."
        )
    return pair[0], pair[1]


def checked_weights(sample_weight: Any, x: Any, y: Any, name: str = "sample_weight") -> Tensor | None:
    """Weights of the rows as float64, shape (N,), some of them above 0; None if there are none."""
    if sample_weight is None:
        return None
    if isinstance(x, DataLoader):
        raise ValueError(
            f"{name} is given, but x is a DataLoader, which yields pairs (x, y). Pass arrays, or draw rows by their "
            "weights with torch.utils.data.WeightedRandomSampler."
        )
    try:
        values = sample_weight.detach().cpu() if isinstance(sample_weight, Tensor) else np.asarray(sample_weight)
        weights = torch.as_tensor(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is a {type(sample_weight).__name__}; expected numbers, one a row: {error}.") from None
    rows = len(y) if hasattr(y, "__len__") else None
    if weights.ndim != 1 or (rows is not None and len(weights) != rows):
        raise ValueError(f"{name} has shape {tuple(weights.shape)}; expected ({rows},), one weight for each row.")
    bad = ~(weights.isfinite() & (weights >= 0))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name} has {float(weights[row])} in row {row}; expected finite numbers ≥ 0.")
    if not bool((weights > 0).any()):
        raise ValueError(f"{name} is 0 in every row; expected a number above 0 for some.")
    return weights


def _prepare_loader(
    model: Trainable, loader: DataLoader[Any], y: Any, validation: Any, batch_size: int
) -> TrainingData:
    if y is not None:
        raise ValueError("x is a DataLoader, which yields pairs (x, y); leave y out.")
    if isinstance(validation, (int, float, np.number)) and not isinstance(validation, bool):
        raise ValueError(
            f"validation is the fraction {validation}, but x is a DataLoader, whose rows cannot be split; pass (x_val, "
            "y_val), another DataLoader, or None."
        )
    data = Loader(loader, "x", hasattr(model, "collate"))
    held_out = (
        None
        if isinstance(validation, str) and validation == "auto"
        else _prepare_validation(model, validation, batch_size, None)
    )
    if bool(model.fitted):
        _check_first_batch(model, data)
        return TrainingData(data, held_out, None, batch_size)
    keep_x = model.preprocesses_inputs
    inputs, targets = [], []
    for number, batch in enumerate(loader):
        inputs_here, y_here = data.pair(batch, number)
        if number == 0 and isinstance(inputs_here, Tensor):
            model.check_inputs(inputs_here)
        targets.append(y_here)
        if keep_x:
            inputs.append(inputs_here)
    data.count = len(targets)
    if not targets:
        raise ValueError("x is a DataLoader that yields no batch.")
    y_all = model.check_targets(torch.cat(targets))
    if len(y_all) < 2:
        raise ValueError(f"x has {len(y_all)} row; expected at least 2 to learn from.")
    units = model.check_inputs(torch.cat(inputs)) if keep_x else None, y_all
    return TrainingData(data, held_out, units, batch_size)


def _check_first_batch(model: Trainable, data: Loader) -> None:
    x, y = data.sample()
    if isinstance(x, Tensor):
        model.check_inputs(x)
    model.check_targets(y)


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _fingerprint(tensor: Tensor) -> str:
    """A checksum of at most 64 MB, rows taken at equal distances."""
    step = max(1, -(-tensor.nbytes // 2**26))
    content = tensor[::step].detach().cpu().contiguous()
    return hashlib.sha256(content.reshape(-1).view(torch.uint8).numpy().data).hexdigest()[:16]
