"""Training steps: forward, backward, clipping and optimiser, on batches that change from step to step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import energyreg as er
from benchmarks import plain
from benchmarks.rows import Benchmark, Measurement, Options, Skipped
from benchmarks.timing import growth, paired
from energyreg.densities.bases import Lebesgue
from energyreg.densities.noise import GaussianNoise
from energyreg.networks.heads import JointHead
from energyreg.networks.proposals import MixtureDensityNetwork
from energyreg.objectives import NCE, ExactMaximumLikelihood, NCEWithLearnedProposal
from experiments.one_dimensional import networks

__all__ = ["BENCHMARKS", "joint_model", "matrix_products", "table", "training_step"]

FEATURES = 9
SCALES = (0.1, 0.8)
"""Scales of the noise, the papers' for NCE on toy 1."""

Step = Callable[[], object]


def table(rows: int, dim: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A table of nine features, with targets that have two humps in each dimension."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator)
    sign = torch.where(torch.rand(rows, dim, generator=generator) < 0.6, 1.0, -1.0)
    y = sign * (1 + x[:, :1].sin()) + 0.3 * torch.randn(rows, dim, generator=generator)
    return x, y


def batches(x: Tensor, y: Tensor, size: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end."""
    x, y = x.to(device), y.to(device)
    pairs = [pair for pair in zip(x.split(size), y.split(size), strict=True) if len(pair[1]) == size]
    return itertools.cycle(pairs)


# The library's way ----------------------------------------------------------------------------------------------------


def training_step(model: er.EnergyRegressionModel, objective: Any, size: int, options: Options) -> Step:
    """A step of `er.fit` with its default settings, without the bookkeeping around it.

    Args:
        model: The model; its preprocessing is fitted here.
        objective: What it minimises.
        size: Rows of a batch.
        options: How to measure.
    """
    x, y = table(max(16 * size, 2048), model.space.dim)
    model.fit_preprocessing(x, y)
    model.to(options.device).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 1e-2},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    generator = torch.Generator(options.device).manual_seed(0)
    data = batches(x, y, size, options.device)

    def step() -> None:
        optimiser.zero_grad()
        f, q, z = model.condition(*next(data))
        objective(f, q, z, generator=generator).per_example.mean().backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimiser.step()

    return step


def joint_model(dim: int = 1, width: int = 256, proposal: bool = False) -> er.EnergyRegressionModel:
    """A joint head on the default encoder, with no base, as in the papers."""
    model = er.EnergyRegressionModel.for_table(FEATURES, er.spaces.Real(1), width=width)
    return er.EnergyRegressionModel(
        model.encoder,
        JointHead(width, dim, width=width, depth=2),
        proposal=MixtureDensityNetwork(width, dim) if proposal else None,
        base=Lebesgue(dim),
        space=er.spaces.Real(dim),
    )


def toy_library(batch: int, samples: int, options: Options, fused: bool = False) -> Step:
    """The papers' network with a split first layer under the library's objective: what `joint-toy` measures."""
    network = networks.tanh_network([torch.Generator().manual_seed(0)], fused=fused).to(options.device)
    model = networks.Model(network)
    objective = NCE(GaussianNoise(SCALES), samples)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator(options.device).manual_seed(0)
    data = batches(*toy_table(64 * batch), batch, options.device)

    def step() -> None:
        x, y = next(data)
        f, q = model(x.T)
        loss = objective(f, q, y, generator=generator).per_example.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


# The plain way --------------------------------------------------------------------------------------------------------


def toy_table(rows: int) -> tuple[Tensor, Tensor]:
    """Scalar x, and targets with two humps."""
    x, y = table(rows)
    return x[:, :1].contiguous(), y


def toy_plain(batch: int, samples: int, options: Options) -> Step:
    """The papers' network and step, as their code writes them."""
    torch.manual_seed(0)
    network = plain.ToyNetwork().to(options.device)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    scales = torch.tensor(SCALES, device=options.device)[:, None]
    data = batches(*toy_table(64 * batch), batch, options.device)

    def step() -> None:
        x, y = next(data)
        points, density, density_target = plain.sample_noise(y, scales, samples)
        loss = plain.nce_loss(network(x, points[..., 0]), density, density_target).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def joint_plain(model: er.EnergyRegressionModel, batch: int, samples: int, options: Options) -> Step:
    """The plain step of the same encoder and joint network, with the same clipping."""
    x, y = table(max(16 * batch, 2048))
    model.fit_preprocessing(x, y)
    model.to(options.device).train()
    network = plain.JointNetwork(model.head).to(options.device)
    parameters = [*model.encoder.parameters(), *network.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)
    scales = torch.tensor(SCALES, device=options.device)[:, None]
    data = batches(x, y, batch, options.device)

    def step() -> None:
        inputs, targets = next(data)
        points, density, density_target = plain.sample_noise(
            model.space.to_model(targets).to(model.dtype), scales, samples
        )
        f = network(model.encoder(inputs), 2 * model.base.to_unit(points) - 1)
        loss = plain.nce_loss(f, density, density_target).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimiser.step()

    return step


# Matrix products alone ------------------------------------------------------------------------------------------------

PRODUCTS = {
    torch.ops.aten.mm: (0, 1), torch.ops.aten.addmm: (1, 2), torch.ops.aten.addmm_: (1, 2),
    torch.ops.aten.bmm: (0, 1), torch.ops.aten.baddbmm: (1, 2), torch.ops.aten.baddbmm_: (1, 2),
}  # fmt: skip
"""Operations that are matrix products, with the places of their operands."""


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Tensor, Tensor]] = []
        self.known: dict[tuple[object, ...], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = PRODUCTS.get(func.overloadpacket)
        if places is not None:
            a, b = (self._like(args[place], place) for place in places)
            self.operands.append((a, b))
        return func(*args, **(kwargs or {}))

    def _like(self, tensor: Tensor, place: int) -> Tensor:
        """A random tensor of the same sizes and strides (0 for a broadcast dimension, too), one for all like it."""
        key = (place, tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self.known:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            self.known[key] = new.fill_(0.01) if 0 in tensor.stride() else new.normal_()
        return self.known[key]


def matrix_products(step: Step) -> tuple[Step, float]:
    """The matrix products of a step by themselves, forward and backward, into memory that is there; and their flops."""
    record = _Record()
    with record:
        step()
    if not record.operands:
        raise Skipped("the step shows no matrix products")
    outputs = {(id(a), id(b)): torch.matmul(a, b) for a, b in record.operands}
    work = [(a, b, outputs[id(a), id(b)]) for a, b in record.operands]

    def products() -> None:
        for a, b, out in work:
            torch.matmul(a, b, out=out)

    return products, sum(2.0 * out.numel() * a.shape[-1] for a, b, out in work)


# Rows -----------------------------------------------------------------------------------------------------------------


def _joint_toy(options: Options) -> Measurement:
    batch, samples = options.size(32, tiny=4), options.size(1024, tiny=16)
    actions = {"plain": toy_plain(batch, samples, options), "library": toy_library(batch, samples, options)}
    compiled = options.device == "cpu" and not options.tiny and _compiles()
    if compiled:
        actions["experiments, compiled"] = toy_library(batch, samples, options, fused=True)
    times = paired(actions, options.rounds, device=options.device)
    details = {"B": batch, "M": samples}
    if compiled:
        details["compiled"] = f"{times.ratio('plain', 'experiments, compiled').median:.2f} ×"
    return Measurement.of(times.ratio("plain", "library"), {name: times.median(name) for name in actions}, **details)


def _compiles() -> bool:
    from experiments.one_dimensional.fused import extension

    return extension() is not None


def _joint_wide(options: Options) -> Measurement:
    batch, samples, width = options.size(256, tiny=8), options.size(128, tiny=4), options.size(256, tiny=16)
    torch.manual_seed(0)
    actions = {
        "plain": joint_plain(joint_model(width=width), batch, samples, options),
        "library": training_step(joint_model(width=width), NCE(GaussianNoise(SCALES), samples), batch, options),
    }
    times = paired(actions, options.rounds, device=options.device)
    seconds = {name: times.median(name) for name in actions}
    return Measurement.of(times.ratio("plain", "library"), seconds, B=batch, M=samples, width=width)


def _separable(options: Options) -> Measurement:
    batch, nodes, width = options.size(256, tiny=8), options.size(256, tiny=16), options.size(256, tiny=16)
    torch.manual_seed(0)
    make = er.EnergyRegressionModel
    energy = make.for_table(FEATURES, width=width)
    mixture = make.mixture_for_table(FEATURES, num_components=8, width=width)
    actions = {
        "separable": training_step(energy, ExactMaximumLikelihood(nodes), batch, options),
        "mixture": training_step(mixture, mixture.default_objective(), batch, options),
    }
    times = paired(actions, options.rounds, device=options.device)
    seconds = {name: times.median(name) for name in actions}
    return Measurement.of(times.ratio("separable", "mixture"), seconds, B=batch, G=nodes, width=width)


def _limit(joint: bool, options: Options) -> Measurement:
    batch, width = options.size(256, tiny=8), options.size(256, tiny=16)
    torch.manual_seed(0)
    if joint:
        model, objective = joint_model(width=width), NCE(GaussianNoise(SCALES), options.size(128, tiny=4))
    else:
        model = er.EnergyRegressionModel.for_table(FEATURES, width=width)
        objective = ExactMaximumLikelihood(options.size(256, tiny=16))
    step = training_step(model, objective, batch, options)
    step()
    products, flops = matrix_products(step)
    times = paired({"step": step, "products": products}, options.rounds, device=options.device)
    seconds = {name: times.median(name) for name in ("step", "products")}
    speed = f"{flops / seconds['products'] / 1e9:.0f} Gflop/s in the products"
    return Measurement.of(times.ratio("step", "products"), seconds, gigaflops=round(flops / 1e9, 4), speed=speed)


def _together(small: bool, options: Options) -> Measurement:
    members, epochs = options.size(20, tiny=2), options.size(4, quick=2, tiny=1)
    width, batch, nodes = (32, 32, 64) if small else (options.size(256, tiny=16), 256, options.size(256, tiny=16))
    x, y = table(options.size(64 * batch, tiny=2 * batch))
    settings: dict[str, Any] = {
        "objective": ExactMaximumLikelihood(nodes), "batch_size": batch, "epochs": epochs, "validation": None,
        "progress": False,
    }  # fmt: skip

    def build() -> er.EnergyRegressionModel:
        return er.EnergyRegressionModel.for_table(FEATURES, width=width).to(options.device)

    def one() -> None:
        er.fit(build(), x, y, **settings)

    def together() -> None:
        er.fit_ensemble(build, x, y, n_members=members, **settings)

    rounds = max(options.rounds // 3, 1)
    times = paired({"one": one, "together": together}, rounds, device=options.device, warm_up=1, shortest=0.0)
    seconds = {name: times.median(name) for name in ("one", "together")}
    return Measurement.of(times.ratio("together", "one"), seconds, members=members, width=width, B=batch, G=nodes)


# Growth ---------------------------------------------------------------------------------------------------------------


def _growth(make: Callable[[int], Step], sizes: list[int], options: Options) -> Measurement:
    sizes = [max(size // 32, 1 + place) for place, size in enumerate(sizes)] if options.tiny else sizes
    times = paired({str(size): make(size) for size in sizes}, max(options.rounds // 2, 2), device=options.device)
    medians = {name: times.median(name) for name in times.seconds}
    exponents = sorted(
        growth(sizes, [times.seconds[str(size)][place] for size in sizes])
        for place in range(len(times.seconds[str(sizes[0])]))
    )
    last = growth(sizes[-2:], [medians[str(size)] for size in sizes[-2:]])
    low, high = exponents[len(exponents) // 4], exponents[-1 - len(exponents) // 4]
    details = {"sizes": sizes, "exponent between the last two sizes": round(last, 3)}
    return Measurement(growth(sizes, list(medians.values())), (low, high), seconds=medians, details=details)


def _growth_of_batch(options: Options) -> Measurement:
    def make(size: int) -> Step:
        return training_step(er.EnergyRegressionModel.for_table(FEATURES), ExactMaximumLikelihood(256), size, options)

    return _growth(make, [512, 1024, 2048, 4096], options)


def _growth_of_nodes(options: Options) -> Measurement:
    def make(size: int) -> Step:
        return training_step(er.EnergyRegressionModel.for_table(FEATURES), ExactMaximumLikelihood(size), 256, options)

    return _growth(make, [1024, 2048, 4096, 8192], options)


def _growth_of_samples(options: Options) -> Measurement:
    def make(size: int) -> Step:
        return training_step(joint_model(width=128), NCE(GaussianNoise(SCALES), size), 64, options)

    return _growth(make, [64, 128, 256, 512], options)


def _growth_of_dimensions(options: Options) -> Measurement:
    def make(size: int) -> Step:
        model = joint_model(size, width=128, proposal=True)
        return training_step(model, NCEWithLearnedProposal(32), 64, options)

    return _growth(make, [8, 16, 32, 64], options)


def _growth_of_width(options: Options) -> Measurement:
    def make(size: int) -> Step:
        model = er.EnergyRegressionModel.for_table(FEATURES, width=size)
        return training_step(model, ExactMaximumLikelihood(256), 256, options)

    return _growth(make, [512, 1024, 2048, 4096], options)


def _growth_row(name: str, work: str, measure: Callable[[Options], Measurement]) -> Benchmark:
    square = name == "width"
    target = "≤ 2.1: the layers are matrix products of this width on both sides" if square else "≤ 1.1"
    return Benchmark(f"growth-{name}", work, target, measure, 2.1 if square else 1.1, "lower", "{:.2f}")


BENCHMARKS = [
    Benchmark(
        "joint-toy", "step, joint head, papers' toy network, B = 32, M = 1024, against the plain formulation",
        "≥ 4 × faster", _joint_toy, 4, "higher", guarded="value",
    ),
    Benchmark(
        "joint-wide", "step, joint head, width 256, B = 256, M = 128, against the plain formulation",
        "≥ 2.5 × faster", _joint_wide, 2.5, "higher", guarded="value",
    ),
    Benchmark(
        "separable", "step, separable head, B = 256, G = 256, width 256, against a mixture with K = 8",
        "≤ 1.3 ×", _separable, 1.3, guarded="value",
    ),
    Benchmark(
        "limit-separable", "step, separable head, width 256, against its matrix products alone", "≤ 2 ×",
        partial(_limit, False), 2, guarded="value",
    ),
    Benchmark(
        "limit-joint", "step, joint head, width 256, against its matrix products alone", "≤ 2 ×",
        partial(_limit, True), 2, guarded="value",
    ),
    Benchmark(
        "together-small", "20 models together against one, width 32, B = 32, G = 64", "≤ 5 ×",
        partial(_together, True), 5, guarded="value",
    ),
    Benchmark(
        "together", "20 models together against one, width 256, B = 256, G = 256", "≤ 5 ×",
        partial(_together, False), 5, long=True,
    ),
    _growth_row("batch", "exponent of a step's time in the rows of a batch, separable head", _growth_of_batch),
    _growth_row("nodes", "exponent of a step's time in the nodes G, separable head", _growth_of_nodes),
    _growth_row("samples", "exponent of a step's time in the samples M, joint head", _growth_of_samples),
    _growth_row("dimensions", "exponent of a step's time in the target dimensions D, joint head",
                _growth_of_dimensions),
    _growth_row("width", "exponent of a step's time in the encoder's width, separable head", _growth_of_width),
]  # fmt: skip
