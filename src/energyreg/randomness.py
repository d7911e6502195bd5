"""Randomness that leaves the caller's random state as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["caller_random_state", "mix", "random_like", "seed_global"]


def mix(*numbers: int) -> int:
    """A seed from several numbers (the finaliser of SplitMix64 on each)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def seed_global(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of one device, and no other's."""
    # Not torch.manual_seed: it would seed the devices that are none of our business, too.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def caller_random_state() -> Iterator[None]:
    """Give the caller's random state back at the end, on every device that is in use."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def random_like(
    draw: Callable[..., Tensor], shape: Sequence[int], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw numbers of the type and on the device of a tensor, by `torch.rand` or `torch.randn`.

    They are drawn where the generator is, so that one of the CPU serves a model on a GPU.
    """
    source = like.device if generator is None else generator.device
    return draw(shape, generator=generator, dtype=like.dtype, device=source).to(like.device)
