"""Random numbers of our own: nothing here reads, sets or restores the random state of the caller, or of a thread.

Torch's layers, initialisations and loaders draw from one generator a process. `RandomSource` gives the thread that uses
it generators of its own, with the numbers that `torch.manual_seed` would give; so what runs in several threads draws
what it draws alone, and nobody's numbers change.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

__all__ = ["RandomSource", "draws_by_itself", "generator_for", "mix", "random_like", "redirected_items"]

Item = TypeVar("Item")
_this_thread = threading.local()


def mix(*numbers: int) -> int:
    """A seed from several numbers (the finaliser of SplitMix64 on each)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class RandomSource:
    """Random numbers of one seed, the same on each device as after `torch.manual_seed`.

    Args:
        seed: The seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._generators = seed, dict[torch.device, torch.Generator]()

    def seed(self, seed: int) -> None:
        """Start again with another seed."""
        self._seed, self._generators = seed, {}

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let layers of this library, in this thread, draw from this source; see `generator_for`."""
        outer = getattr(_this_thread, "source", None)
        _this_thread.source = self
        try:
            yield
        finally:
            _this_thread.source = outer

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[None]:
        """Let all that torch draws in this thread come from this source, for code that takes no generator.

        Each operation costs some microseconds more. Three things draw from torch's own generator all the same:
        attention with dropout in one kernel, on a GPU; compiled code; and `torch.utils.checkpoint`, which could not
        repeat the numbers of another.
        """
        with self.in_use(), _Redirection(self):
            yield


def generator_for(device: torch.device) -> torch.Generator | None:
    """What a layer draws from in this thread: the source in use, or None for torch's global generator."""
    source: RandomSource | None = getattr(_this_thread, "source", None)
    return None if source is None else source.generator(device)


def redirected_items(items: Iterable[Item]) -> Iterator[Item]:
    """The items, such as the batches of a loader, that are made with the random numbers of the source in use."""
    source: RandomSource | None = getattr(_this_thread, "source", None)
    if source is None:
        yield from items
        return
    end: Any = object()
    with source.everywhere():
        iterator = iter(items)
    while True:
        with source.everywhere():  # not around the yield: the caller's code is none of its business
            item = next(iterator, end)
        if item is end:
            return
        yield item


def draws_by_itself(*parts: Any) -> bool:
    """Whether a module, or an objective, may draw random numbers without `generator_for` or a generator given to it.

    The modules of this library do not, nor do those of torch but for the ones below. Of others nothing is known.
    """
    modules = [inner for part in parts for inner in (part.modules() if isinstance(part, torch.nn.Module) else [part])]
    known = (f"{__name__.split('.')[0]}.", "torch.nn.modules.")
    drawing = ("dropout", "activation", "rnn", "transformer", "pooling")  # the last two: fractional max pooling
    quiet = (torch.nn.ReLU, torch.nn.SiLU, torch.nn.GELU, torch.nn.Tanh, torch.nn.ELU, torch.nn.LeakyReLU,
             torch.nn.Softplus, torch.nn.Sigmoid)  # fmt: skip
    return any(
        not kind.__module__.startswith(known) or (kind.__module__.rpartition(".")[2] in drawing and kind not in quiet)
        for kind in map(type, modules)
    )


class _Redirection(TorchDispatchMode):
    """Hands the generators of a source to the random operations of a thread."""

    def __init__(self, source: RandomSource) -> None:
        super().__init__()
        self.source, self.process = source, os.getpid()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No need to import the compiler, which takes seconds."""
        return False

    def __enter__(self) -> _Redirection:
        """Enter by the stack of this thread alone: torch's own way sets flags of the process, and threads race."""
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave."""
        _pop_mode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A worker of a loader, forked from this thread, has seeded itself.
        if torch.Tag.nondeterministic_seeded not in func.tags or os.getpid() != self.process:
            return func(*args, **kwargs)
        first: Any = next((arg for arg in args if isinstance(arg, Tensor)), None)
        device = torch.device(kwargs.get("device") or ("cpu" if first is None else first.device))
        if device.type == "meta" or _in_checkpoint():
            return func(*args, **kwargs)
        generator = self.source.generator(device)
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            x, p, training = args
            if not training or p == 0:
                return func(*args)
            kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
            return x * kept * (0.0 if p == 1 else 1 / (1 - p)), kept
        if name.endswith("_like"):
            low = args[1:]  # (), (high,) or (low, high)
            empty = torch.empty_like(first, **kwargs)
            if name == "randint_like":
                return empty.random_(*(low if len(low) == 2 else (0, *low)), generator=generator)
            return (empty.uniform_ if name == "rand_like" else empty.normal_)(generator=generator)
        names = [argument.name for argument in func._schema.arguments]
        if "generator" in names:
            position = names.index("generator")
            if kwargs.get("generator") is None and (len(args) <= position or args[position] is None):
                return func(*args[:position], **{**kwargs, "generator": generator})
            return func(*args, **kwargs)
        overload = {"default": "generator", "low": "low_generator"}.get(func._overloadname, "")
        if overload in func.overloadpacket.overloads():
            return getattr(func.overloadpacket, overload)(*args, generator=generator, **kwargs)
        return func(*args, **kwargs)


def _in_checkpoint() -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def random_like(
    draw: Callable[..., Tensor], shape: Sequence[int], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw numbers of the type and on the device of a tensor, by `torch.rand` or `torch.randn`.

    They are drawn where the generator is, so that one of the CPU serves a model on a GPU.
    """
    source = like.device if generator is None else generator.device
    return draw(shape, generator=generator, dtype=like.dtype, device=source).to(like.device)
