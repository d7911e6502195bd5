"""The second stages: what each learns from annotated boxes, and where it moves a detected one.

All are the same network on the same pooled features, start from the same weights, and train for as many steps on as
many crops. They differ in what comes out of the network, in the loss, and in how a better box is found with it. What
a method leaves open is chosen on the development pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from energyreg import objectives
from energyreg.densities.mixtures import GaussianMixture
from energyreg.densities.noise import GaussianNoise
from energyreg.inference.ascent import refine
from energyreg.inference.points import WeightedPoints
from energyreg.vision import (
    BoxDistribution,
    BoxEnergy,
    BoxEnergyHead,
    BoxSpace,
    add_energy_head,
    box_noise,
    paired_iou,
    roi_pool,
)
from experiments.detection.detector import Boxes, Seen
from experiments.detection.scores import matches, mean_iou

__all__ = ["METHODS", "Method", "Outcome", "Study"]

WIDTH = 256
"""Hidden width of a second stage, that of the detector's own: so all start from its weights."""
STEPS = {"pennfudan": 300, "bccd": 600, "coco128": 300}
"""Steps of a training; BCCD has ten times the boxes of the others."""
BATCH, SAMPLES = 16, 32
"""Annotated boxes of a step, and crops of each."""
RATE, WEIGHT_DECAY = 1e-3, 1e-2
"""AdamW's settings; the rate falls as a cosine."""
WIDE, NARROW = (0.075, 0.15, 0.3), (0.0375, 0.075, 0.15)
"""Scales of paper II's noise in sides of a box: for NCE and NCE+, and for ML-IS and KLD-IS."""
LABEL_SCALE, DENOISED, BETA = 0.0225, 0.075, 0.1
"""Paper II's width of the label's density for KLD-IS, noise for DSM, and β for NCE+."""
CHAIN_STEPS, CHAIN_SIZE = 8, 0.02
"""Langevin steps of ML-MCMC, and their size, which was not tuned. The paper's 1e-5 moves a box by as little of its
sides, too little to learn from in so short a training."""
PAPER_STEP = (8e-4, 3.2e-3)
"""Paper II's step lengths for NCE+, which are multiplied by one of `FACTORS`."""
FACTORS = (0.1, 1.0, 4.0, 16.0)
ASCENT = 10
"""Steps of an ascent."""
ROUNDS = 3
"""Most rounds of a regression that is repeated."""
WEIGHTS, WIDER = (0.3, 1.0), 1.5
"""Ours: the Gaussian's weight in the product, and how much wider than it the samples lie."""
DRAWS = 64
"""Importance samples of a box where ours takes the mean."""
SHARPEST = 0.02
"""Smallest standard deviation of a regressed Gaussian in sides of a box, so that its likelihood has a bound."""


@dataclass
class Study:
    """One fold of a set: the frozen detector, and what it has seen.

    Attributes:
        detector: The detector.
        train: The training pictures, plain and mirrored, with all detections before suppression.
        development: What settings are chosen by.
        steps: Of a training.
        seed: Of all trainings.
        trained: Networks that several methods share, by name.
    """

    detector: Any
    train: Seen
    development: Seen
    steps: int
    seed: int = 0
    trained: dict[str, nn.Module] = field(default_factory=dict)

    def network(self, name: str, make: Callable[[], nn.Module]) -> Any:
        """The network of that name, trained when it is first wanted."""
        if name not in self.trained:
            torch.manual_seed(self.seed)
            self.trained[name] = make()
        return self.trained[name]


Network = TypeVar("Network", bound=nn.Module)
Refine = Callable[[Seen, Boxes], Tensor]
"""Boxes of pictures to better ones, (N, 4)."""
Around = Callable[[Seen, Boxes, int], BoxDistribution]
"""Boxes of pictures to densities around them, by so many samples of each."""


@dataclass(frozen=True)
class Outcome:
    """A method on one fold.

    Attributes:
        refine: Where boxes go.
        setting: What was chosen on the development pictures.
        iou: Mean IoU there.
        seconds: Time of the training, with all settings that were tried.
        density: What is known of a box that has gone there, where the method says it.
    """

    refine: Refine
    setting: dict[str, Any]
    iou: float
    seconds: float
    density: Around | None = None


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        name: Its name in the results.
        title: What it is.
        fit: Trains it on a fold.
    """

    name: str
    title: str
    fit: Callable[[Study], Outcome]


# ---------------------------------------------------------------------------------------------- networks


def second_stage(detector: Any, outputs: int = 1) -> BoxEnergyHead:
    """The network of all methods; its hidden layers start as the detector's own, its outputs near 0."""
    head = add_energy_head(detector, class_specific=False, width=WIDTH).head
    if outputs > 1:
        head.output = nn.Linear(WIDTH, outputs)
        nn.init.normal_(head.output.weight, std=0.001)
        nn.init.zeros_(head.output.bias)
    return head


def outputs_of(head: BoxEnergyHead, seen: Seen, rows: Boxes) -> Tensor:
    """All outputs for boxes, (N, outputs)."""
    pooled = roi_pool(seen.pyramid, rows.boxes, rows.image, output_size=head.pool_size)
    return head.output(head.hidden(pooled))


def energy(head: BoxEnergyHead, seen: Seen, rows: Boxes) -> BoxEnergy:
    """The library's f, relative to these boxes."""
    ratio = torch.ones(len(rows), 4)
    return BoxEnergy(head, seen.pyramid, BoxSpace(rows.boxes), rows.image, rows.labels, ratio)


def train(network: Network, loss_of: Callable[[torch.Generator], Tensor], study: Study) -> Network:
    """Train in place, and freeze.

    Args:
        network: What is trained.
        loss_of: The loss of a step on what it draws.
        study: The fold.
    """
    generator = torch.Generator().manual_seed(study.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    network.train()
    for step in range(study.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 20, 0.5 * (1 + math.cos(math.pi * step / study.steps)))
        loss = loss_of(generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
    return network.eval().requires_grad_(False)


def some(rows: Boxes, count: int, generator: torch.Generator) -> Boxes:
    """Some boxes at random."""
    return rows[torch.randint(len(rows), (count,), generator=generator)]


def near(true: Boxes, noise: GaussianNoise, count: int, generator: torch.Generator) -> tuple[Boxes, Tensor]:
    """Boxes near true ones, `count` of each, and where the true ones are relative to them, (count · B, 4)."""
    space = BoxSpace(true.boxes)
    boxes = space.to_user(noise.sample(torch.zeros(len(true), 4), count, generator=generator))
    z = BoxSpace(boxes).to_model(true.boxes.expand_as(boxes))
    return Boxes(true.image.repeat(count), boxes.flatten(0, 1), true.labels.repeat(count)), z.flatten(0, 1)


def clipped(boxes: Tensor, seen: Seen, image: Tensor) -> Tensor:
    """Boxes cut off at the borders of their pictures, as the detector's are; one that lies outside stays."""
    sizes = torch.tensor([picture.pixels.shape[:0:-1] * 2 for picture in seen.pictures], dtype=boxes.dtype)
    cut = torch.minimum(boxes.clamp_min(0), sizes[image])
    return torch.where((cut[:, 2:] > cut[:, :2]).all(1, keepdim=True), cut, boxes)


def moved(seen: Seen, rows: Boxes, z: Tensor) -> Boxes:
    """Boxes at z relative to themselves, cut off at the borders."""
    boxes = BoxSpace(rows.boxes).to_user(z)
    return Boxes(rows.image, clipped(boxes, seen, rows.image), rows.labels)


def choose(study: Study, candidates: Iterable[tuple[dict[str, Any], Refine]]) -> tuple[dict[str, Any], Refine, float]:
    """The candidate whose boxes overlap the true ones of the development pictures most."""
    detected = study.development.detected
    tried = []
    for setting, move in candidates:
        tried.append((mean_iou(study.development, move(study.development, detected)), setting, move))
    iou, setting, move = max(tried, key=lambda each: each[0])
    return setting, move, iou


def finish(study: Study, started: float, candidates: Sequence[tuple[dict[str, Any], Refine, Around | None]]) -> Outcome:
    """The outcome with the best of the candidates."""
    seconds = time.perf_counter() - started
    setting, move, iou = choose(study, [(setting, move) for setting, move, _ in candidates])
    density = next(density for each, _, density in candidates if each is setting)
    return Outcome(move, setting, iou, seconds, density)


# ---------------------------------------------------------------------------------------------- regression


Jitter = tuple[float, ...] | None
"""Scales of the noise that crops are drawn with around annotated boxes; None for the detector's own boxes."""


def pairs(study: Study, jitter: Jitter) -> Callable[[torch.Generator], tuple[Boxes, Tensor]]:
    """What draws crops for a regression, and where the true boxes are relative to them."""
    true = study.train.true
    if jitter is not None:
        noise = box_noise(jitter)
        return lambda generator: near(some(true, BATCH, generator), noise, SAMPLES, generator)
    row, target = matches(study.train.detected, true)
    crops = study.train.detected[row]
    z = BoxSpace(crops.boxes).to_model(true.boxes[target])

    def draw(generator: torch.Generator) -> tuple[Boxes, Tensor]:
        chosen = torch.randint(len(row), (BATCH * SAMPLES,), generator=generator)
        return crops[chosen], z[chosen]

    return draw


def _direct(study: Study, jitter: Jitter) -> BoxEnergyHead:
    def make() -> nn.Module:
        head, draw = second_stage(study.detector, 4), pairs(study, jitter)

        def loss_of(generator: torch.Generator) -> Tensor:
            crops, z = draw(generator)
            return smooth_l1_loss(outputs_of(head, study.train, crops), z, beta=0.02)

        return train(head, loss_of, study)

    return study.network(f"direct {jitter}", make)


@torch.no_grad()
def _repeat(step: Callable[[Seen, Boxes], Tensor], rounds: int, seen: Seen, rows: Boxes) -> Tensor:
    for _ in range(rounds):
        rows = moved(seen, rows, step(seen, rows))
    return rows.boxes


def direct(study: Study, rounds: Sequence[int]) -> Outcome:
    """Direct regression of the box from its crop, once or repeatedly."""
    started = time.perf_counter()
    candidates: list[tuple[dict[str, Any], Refine, Around | None]] = []
    for jitter in (NARROW, WIDE, None):
        head = _direct(study, jitter)
        for count in rounds:
            setting = {"crops": "detections" if jitter is None else jitter, "rounds": count}
            candidates.append((setting, partial(_repeat, partial(outputs_of, head), count), None))
    return finish(study, started, candidates)


def _normal(raw: Tensor) -> GaussianMixture:
    """A Gaussian from eight outputs."""
    mean, log_scale = raw.split(4, -1)
    scale = 0.1 * log_scale.clamp(-4, 3).exp() + SHARPEST
    return GaussianMixture(raw.new_zeros(len(raw), 1), mean[:, None], scale[:, None])


@torch.no_grad()
def _normal_density(head: BoxEnergyHead, seen: Seen, rows: Boxes, draws: int) -> BoxDistribution:
    q = _normal(outputs_of(head, seen, rows))
    z = q.sample((draws,), generator=torch.Generator().manual_seed(0))
    weights = torch.full(z.shape[:2], -math.log(len(z)))
    return BoxDistribution(q.log_prob, BoxSpace(rows.boxes), WeightedPoints(z, weights), (math.inf, math.inf))


def _gaussian(study: Study, jitter: Jitter) -> BoxEnergyHead:
    def make() -> nn.Module:
        head, draw = second_stage(study.detector, 8), pairs(study, jitter)

        def loss_of(generator: torch.Generator) -> Tensor:
            crops, z = draw(generator)
            return -_normal(outputs_of(head, study.train, crops)).log_prob(z).mean()

        return train(head, loss_of, study)

    return study.network(f"gaussian {jitter}", make)


def gaussian(study: Study) -> Outcome:
    """A Gaussian by maximum likelihood; its mean, once or repeatedly."""
    started = time.perf_counter()
    candidates: list[tuple[dict[str, Any], Refine, Around | None]] = []
    for jitter in (NARROW, WIDE):
        head = _gaussian(study, jitter)

        def mean(seen: Seen, rows: Boxes, head: BoxEnergyHead = head) -> Tensor:
            return _normal(outputs_of(head, seen, rows)).mean

        for count in range(1, ROUNDS + 1):
            setting = {"crops": jitter, "rounds": count}
            candidates.append((setting, partial(_repeat, mean, count), partial(_normal_density, head)))
    return finish(study, started, candidates)


# ---------------------------------------------------------------------------------------------- energies


def _climb(head: BoxEnergyHead, factor: float, seen: Seen, rows: Boxes) -> Tensor:
    steps = [factor * step for step in PAPER_STEP for _ in range(2)]
    z = refine(energy(head, seen, rows), torch.zeros(len(rows), 4), num_steps=ASCENT, step_size=steps)
    return moved(seen, rows, z).boxes


@torch.no_grad()
def _density(head: BoxEnergyHead, scales: Sequence[float], seen: Seen, rows: Boxes, draws: int) -> BoxDistribution:
    return BoxDistribution.around(
        energy(head, seen, rows), rows.boxes, noise=box_noise(scales), num_samples=draws, shared=True,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def score_ascent(study: Study) -> Outcome:
    """f is the IoU with the true box, by regression, as in IoU-Net."""
    started = time.perf_counter()

    def make() -> nn.Module:
        head, true, noise = second_stage(study.detector), study.train.true, box_noise(WIDE)

        def loss_of(generator: torch.Generator) -> Tensor:
            rows = some(true, BATCH, generator)
            crops, _ = near(rows, noise, SAMPLES, generator)
            iou = paired_iou(crops.boxes, rows.boxes.repeat(SAMPLES, 1))
            return smooth_l1_loss(outputs_of(head, study.train, crops)[:, 0], iou, beta=0.1)

        return train(head, loss_of, study)

    head = study.network("iou", make)
    # The slope of an IoU is that of a density about a tenth wide on the scale of 1, not of nats.
    return finish(study, started, [({"factor": f}, partial(_climb, head, f), None) for f in (1, 4, 16, 64)])


def _trained_by(study: Study, name: str, objective: Any) -> BoxEnergyHead:
    def make() -> nn.Module:
        head, true = second_stage(study.detector), study.train.true

        def loss_of(generator: torch.Generator) -> Tensor:
            rows = some(true, BATCH, generator)
            f = energy(head, study.train, rows)
            return objective(f, None, torch.zeros(BATCH, 4), generator=generator).per_example.mean()

        return train(head, loss_of, study)

    return study.network(name, make)


def by_objective(study: Study, name: str, objective: Any, scales: Sequence[float]) -> Outcome:
    """An energy by one of the library's objectives; ascent with the step length that serves best.

    Args:
        study: The fold.
        name: Of the network.
        objective: The objective.
        scales: Importance sampler for the density.
    """
    started = time.perf_counter()
    head = _trained_by(study, name, objective)
    density = partial(_density, head, scales)
    return finish(study, started, [({"factor": factor}, partial(_climb, head, factor), density) for factor in FACTORS])


# ---------------------------------------------------------------------------------------------- ours


@dataclass(frozen=True)
class Product:
    r"""The energy of NCE+ times a Gaussian that is regressed from the crop, by importance sampling.

    .. math:: p(y) \propto q(y)^w e^{f(y)}

    Args:
        gaussian: Makes q.
        energy: Makes f.
        weight: w.
    """

    gaussian: BoxEnergyHead
    energy: BoxEnergyHead
    weight: float

    @torch.no_grad()
    def around(self, seen: Seen, rows: Boxes, draws: int) -> BoxDistribution:
        """The density relative to boxes, from samples of q, but wider."""
        q, f = _normal(outputs_of(self.gaussian, seen, rows)), energy(self.energy, seen, rows)
        sampler = GaussianMixture(q.log_mixing, q.means, WIDER * q.scales)
        z = sampler.sample((draws,), generator=torch.Generator().manual_seed(0))

        def value(z: Tensor) -> Tensor:
            return self.weight * q.log_prob(z) + f(z)

        points = WeightedPoints(z, value(z) - sampler.log_prob(z) - math.log(draws))
        return BoxDistribution(value, BoxSpace(rows.boxes), points, (math.inf, math.inf))

    def mean(self, seen: Seen, rows: Boxes) -> Tensor:
        """The density's mean in the coordinates relative to boxes."""
        return self.around(seen, rows, DRAWS).points.expectation(lambda z: z)


def ours(study: Study) -> Outcome:
    """The mean of the product of NCE+'s energy and the Gaussian, once or twice."""
    started = time.perf_counter()
    experts = _gaussian(study, WIDE), _trained_by(study, "nce+", NCE_PLUS)
    candidates: list[tuple[dict[str, Any], Refine, Around | None]] = []
    for weight in WEIGHTS:
        product = Product(*experts, weight)
        for count in (1, 2):
            setting = {"weight": weight, "rounds": count}
            candidates.append((setting, partial(_repeat, product.mean, count), product.around))
    return finish(study, started, candidates)


# ---------------------------------------------------------------------------------------------- all of them


def nothing(study: Study) -> Outcome:
    """The detector's own boxes."""
    return finish(study, time.perf_counter(), [({}, lambda seen, rows: rows.boxes, None)])


NCE_PLUS = objectives.NCE(box_noise(WIDE), SAMPLES, beta=BETA)


def _energy(name: str, title: str, objective: Any, scales: Sequence[float] = NARROW) -> Method:
    return Method(name, title, lambda study: by_objective(study, name, objective, scales))


METHODS: Sequence[Method] = [
    Method("detector", "the detector alone", nothing),
    Method("direct", "direct regression from the crop", lambda study: direct(study, [1])),
    Method("direct-iterated", "the same, two or three times", lambda study: direct(study, range(2, ROUNDS + 1))),
    Method("gaussian", "a Gaussian by maximum likelihood", gaussian),
    Method("iou-net", "ascent on a predicted IoU", score_ascent),
    _energy("ml-is", "energy, ML with importance sampling",
            objectives.MaximumLikelihoodImportanceSampling(box_noise(NARROW), SAMPLES)),
    _energy("kld-is", "energy, KL divergence with importance sampling",
            objectives.KLDImportanceSampling(box_noise(NARROW), LABEL_SCALE, SAMPLES)),
    _energy("nce", "energy, NCE", objectives.NCE(box_noise(WIDE), SAMPLES)),
    _energy("nce+", "energy, NCE+", NCE_PLUS),
    _energy("dsm", "energy, denoising score matching", objectives.DenoisingScoreMatching(DENOISED, SAMPLES // 2)),
    _energy("ml-mcmc", "energy, ML with short Langevin chains",
            objectives.MaximumLikelihoodMCMC(CHAIN_STEPS, CHAIN_SIZE, SAMPLES // CHAIN_STEPS)),
    Method("ours", "the mean of the product of NCE+'s energy and the Gaussian", ours),
]  # fmt: skip
"""In the order of work."""
