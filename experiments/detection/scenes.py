"""Boxes with a border that is hidden at random: does the density show both places where it may be?

A bar lies on a plate, or behind it. Bars come in two lengths, and the colour of a bar says how many of its kind are
long. Where the plate hides the right end, the picture leaves two places for that border, whose probabilities are known;
where it does not, one. So the true density is known in closed form, and with it the best score that is to be had.

    python -m experiments.detection.scenes run       # three seeds of every method, a few minutes each; resumes
    python -m experiments.detection.scenes report    # results/scenes/README.md and the picture
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from energyreg import objectives
from energyreg.cli.demo import describe_machine
from energyreg.densities.mixtures import GaussianMixture
from energyreg.densities.noise import GaussianNoise
from energyreg.files import write_atomically
from energyreg.inference.ascent import refine
from energyreg.networks.proposals import MixtureDensityNetwork
from energyreg.vision.boxes.corners import paired_iou
from energyreg.vision.boxes.distribution import WINDOW, box_noise, inside
from energyreg.vision.boxes.energy import BoxEnergy, BoxEnergyHead
from energyreg.vision.boxes.geometry import Boxes2D, by_coordinate
from energyreg.vision.boxes.spaces import BoxSpace
from energyreg.vision.pooling.roi_pool import Pyramid, roi_pool
from experiments.claims import do_each, in_processes

__all__ = ["METHODS", "Scenes", "draw", "report", "run"]

RESULTS = Path(__file__).parent / "results" / "scenes"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "detection" / "scenes.png"

# The scenes -----------------------------------------------------------------------------------------------------------

SIDE = 64
"""Height and width of an image, in pixels."""
SHORT, LONG, MEAN = 1.5, 2.6, 2.0
"""Lengths of bars, and of what a detector would propose, in heights of the bar."""
ANNOTATION = 0.75
"""Standard deviation of an annotated border around the true one, in pixels."""
TEXTURE = 0.05
"""Standard deviation of the noise of a pixel, whose colours go from 0 to 1."""
PROPOSAL = 0.08
"""Standard deviation of the borders of the reference box, in heights of the bar."""


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes.

    Attributes:
        images: Colours, shape (B, 3, 64, 64).
        boxes: Annotated boxes, corners in pixels, shape (B, 4).
        reference: What a detector would propose, from what can be seen of the bar's other borders, shape (B, 4). It
            does not depend on the length.
        places: True left, upper and lower border, shape (B, 3).
        rights: Where the right border of a short and of a long bar is, shape (B, 2).
        chances: Probabilities of the two given the image: that of the colour where the end is hidden, and 1 for the
            one that is seen, shape (B, 2).
        hidden: Whether the end is hidden, shape (B,).
    """

    images: Tensor
    boxes: Tensor
    reference: Tensor
    places: Tensor
    rights: Tensor
    chances: Tensor
    hidden: Tensor

    def __getitem__(self, rows: slice) -> Scenes:
        """Some of the scenes."""
        return Scenes(**{name: values[rows] for name, values in vars(self).items()})

    def log_prob(self, boxes: Tensor) -> Tensor:
        """The true log-density of annotated boxes (*S, B, 4), in nats per pixel⁴, shape (*S, B)."""
        known = _normal(boxes[..., [0, 1, 3]], self.places).sum(-1)
        return known + (_normal(boxes[..., 2:3], self.rights) + self.chances.log()).logsumexp(-1)

    def right_density(self, x: Tensor) -> Tensor:
        """The true density of the annotated right border at x (G, B), per pixel, shape (G, B)."""
        return (_normal(x[..., None], self.rights).exp() * self.chances).sum(-1)


def _normal(x: Tensor, mean: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / ANNOTATION).square() - math.log(ANNOTATION * math.sqrt(2 * math.pi))


def draw(count: int, generator: torch.Generator) -> Scenes:
    """Draw scenes at random."""

    def uniform(low: float | Tensor, high: float | Tensor) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    height = uniform(9.0, 15.0)
    left, top = uniform(3.0, 10.0), uniform(4.0, SIDE - 4.0 - height)
    bottom = top + height
    colour = uniform(0.0, 1.0)
    chance = 0.1 + 0.8 * colour  # of being long
    long = torch.rand(count, generator=generator) < chance
    hidden = torch.rand(count, generator=generator) < 0.5
    rights = left[:, None] + height[:, None] * torch.tensor([SHORT, LONG])
    right = torch.where(long, rights[:, 1], rights[:, 0])

    plate_left = left + height * uniform(0.5, 1.2)
    plate = torch.stack([plate_left, top - uniform(2.0, 6.0), rights[:, 1] + uniform(2.0, 8.0),
                         bottom + uniform(2.0, 6.0)], 1)  # fmt: skip
    bar = torch.stack([left, top, right, bottom], 1)
    bar_colour = torch.stack([0.3 + 0.6 * colour, torch.full_like(colour, 0.2), 0.9 - 0.6 * colour], 1)
    plate_colour = torch.tensor([0.75, 0.75, 0.6]).expand(count, 3)
    images = torch.full((count, 3, SIDE, SIDE), 0.4)
    behind = hidden[:, None]
    for box, paint in (
        (torch.where(behind, bar, plate), torch.where(behind, bar_colour, plate_colour)),
        (torch.where(behind, plate, bar), torch.where(behind, plate_colour, bar_colour)),
    ):
        cover = _cover(box)[:, None]
        images = images * (1 - cover) + cover * paint[..., None, None]
    images = images + TEXTURE * normal(3, SIDE, SIDE)

    places = torch.stack([left, top, bottom], 1)
    seen = torch.stack([~long, long], 1).float()
    prior = torch.stack([1 - chance, chance], 1)
    middle = torch.stack([left, top, left + MEAN * height, bottom], 1)
    return Scenes(
        images, bar + ANNOTATION * normal(4), middle + PROPOSAL * height[:, None] * normal(4), places, rights,
        torch.where(hidden[:, None], prior, seen), hidden,
    )  # fmt: skip


def _cover(boxes: Tensor) -> Tensor:
    """Share of each pixel that a box covers, shape (B, 64, 64)."""
    pixel = torch.arange(SIDE)

    def along(low: Tensor, high: Tensor) -> Tensor:
        return (torch.minimum(high[:, None], pixel + 1) - torch.maximum(low[:, None], pixel)).clamp(0, 1)

    x1, y1, x2, y2 = boxes.unbind(1)
    return along(y1, y2)[:, :, None] * along(x1, x2)[:, None, :]


# The networks ---------------------------------------------------------------------------------------------------------

CHANNELS, WIDTH, POOL = 32, 128, 7
"""Features of a node of the map, width of the two hidden layers behind the pooling, and bins of a box a side."""
STRIDE = 4
"""Pixels per node of the map."""


class Backbone(nn.Module):
    """A small feature pyramid that is used at its finest level only: every node knows of the whole image."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 16, CHANNELS, 64, 64]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes))
        self.across = nn.ModuleList(nn.Conv2d(size, CHANNELS, 1) for size in sizes[2:])
        self.smooth = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        for layer in (*self.down, *self.across, *self.smooth):
            # There is no normalisation, and with PyTorch's own start the signal fades from layer to layer.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) to a map (B, C, 16, 16)."""
        maps, x = [], 4 * (images - 0.5)
        for layer in self.down:
            x = layer(x).relu()
            maps.append(x)
        top = self.across[2](maps[3])
        for place, smooth in ((1, self.smooth[1]), (0, self.smooth[0])):
            top = self.across[place](maps[place + 1]) + interpolate(top, scale_factor=2)
            top = smooth(top.relu())
        return top


class MixtureNetwork(nn.Module):
    """A mixture of K Gaussians over the four borders, from the pooled reference box: one look.

    Args:
        components: Gaussians K; 1 for Gaussian regression.
    """

    def __init__(self, components: int) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = BoxEnergyHead(CHANNELS, pool_size=POOL, width=WIDTH)
        self.mixture = MixtureDensityNetwork(WIDTH, 4, components)

    def distribution(self, scenes: Scenes, pyramid: Pyramid | None = None) -> GaussianMixture:
        """The mixture over :class:`Borders`."""
        pyramid = _pyramid(self.backbone, scenes) if pyramid is None else pyramid
        pooled = roi_pool(pyramid, scenes.reference, torch.arange(len(scenes.boxes)), output_size=POOL)
        return self.mixture(self.head.hidden(pooled))

    def log_prob(self, scenes: Scenes, boxes: Tensor) -> Tensor:
        """Log-density of boxes (*S, B, 4), in nats per pixel⁴, shape (*S, B)."""
        space = Borders(scenes.reference)
        return self.distribution(scenes).log_prob(space.to_model(boxes)) + space.log_abs_det_jacobian(boxes)

    def loss(self, scenes: Scenes, generator: torch.Generator) -> Tensor:
        """Negative log-likelihood, shape (B,)."""
        return -self.log_prob(scenes, scenes.boxes)


class EnergyNetwork(nn.Module):
    """f(image, box): the library's head on the map, which pools from the box that is asked about.

    Args:
        objective: What is minimised: it contrasts the annotated box with noise around it.
        space: Coordinates of the noise.
    """

    def __init__(self, objective: Any, space: type[BoxSpace] | type[Borders]) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = BoxEnergyHead(CHANNELS, pool_size=POOL, width=WIDTH)
        self.objective, self.space = objective, space

    def loss(self, scenes: Scenes, generator: torch.Generator) -> Tensor:
        """The objective's loss, which starts from the annotated boxes, as in the library, shape (B,)."""
        f = _energy(self.head, _pyramid(self.backbone, scenes), self.space(scenes.boxes))
        return self.objective(f, None, torch.zeros_like(scenes.boxes), generator=generator)[0]

    def log_density(self, scenes: Scenes) -> Callable[[Tensor], Tensor]:
        """Boxes (*S, B, 4) to log-densities but for a constant of each scene, (*S, B); -∞ outside of the window."""
        space, window = self.space(scenes.reference), BoxSpace(scenes.reference)
        f = _energy(self.head, _pyramid(self.backbone, scenes), space)

        def log_density(boxes: Tensor) -> Tensor:
            valid = window.contains(boxes)
            safe = torch.where(valid[..., None], boxes, scenes.reference)
            valid = valid & inside(window.to_model(safe), by_coordinate(Boxes2D(), WINDOW, "window"))
            return torch.where(valid, f(space.to_model(safe)) + space.log_abs_det_jacobian(safe), -torch.inf)

        return log_density


class MixtureEnergyNetwork(MixtureNetwork):
    """f(image, box) = log q(box | image) + g(image, box): the energy head corrects a mixture, which is its proposal.

    It is contrasted with samples of q, which know nothing of the annotated box, and q learns by its own likelihood.

    Args:
        components: Gaussians K of q.
        objective: What is minimised.
    """

    def __init__(self, components: int, objective: Any) -> None:
        super().__init__(components)
        self.energy_head = BoxEnergyHead(CHANNELS, pool_size=POOL, width=WIDTH)
        self.objective = objective

    def _parts(self, scenes: Scenes) -> tuple[BoxEnergy, GaussianMixture, Borders]:
        pyramid = _pyramid(self.backbone, scenes)
        q, space = self.distribution(scenes, pyramid), Borders(scenes.reference)
        return _energy(self.energy_head, pyramid, space), q, space

    def loss(self, scenes: Scenes, generator: torch.Generator) -> Tensor:
        """The objective's loss, shape (B,)."""
        g, q, space = self._parts(scenes)

        def f(z: Tensor) -> Tensor:
            return g(z) + q.log_prob(z).detach()

        return self.objective(f, q, space.to_model(scenes.boxes), generator=generator)[0]

    def log_density(self, scenes: Scenes) -> Callable[[Tensor], Tensor]:
        """As for :class:`EnergyNetwork`, without a window."""
        g, q, space = self._parts(scenes)

        def log_density(boxes: Tensor) -> Tensor:
            z = space.to_model(boxes)
            return g(z) + q.log_prob(z) + space.log_abs_det_jacobian(boxes)

        return log_density


@dataclass(frozen=True)
class Borders:
    """Borders relative to those of reference boxes (B, 4), in parts of their heights."""

    reference: Tensor
    periodic = (False,) * 4

    @property
    def _unit(self) -> Tensor:
        return UNIT * (self.reference[:, 3:] - self.reference[:, 1:2])

    def to_model(self, boxes: Tensor) -> Tensor:
        """Corners in pixels to z, (*S, B, 4)."""
        return (boxes - self.reference) / self._unit

    def to_user(self, z: Tensor) -> Tensor:
        """z to corners in pixels, (*S, B, 4)."""
        return self.reference + self._unit * z

    def log_abs_det_jacobian(self, boxes: Tensor) -> Tensor:
        """log |det dz/dy|, which is the same for all boxes, shape (B,)."""
        return -4 * self._unit[:, 0].log()


def _pyramid(backbone: Backbone, scenes: Scenes) -> Pyramid:
    return Pyramid.of(backbone(scenes.images), 1 / STRIDE)


def _energy(head: BoxEnergyHead, pyramid: Pyramid, space: Any) -> BoxEnergy:
    count = pyramid.num_images
    labels = torch.zeros(count, dtype=torch.long)
    return BoxEnergy(head, pyramid, space, torch.arange(count), labels, torch.ones(count, 4))


UNIT = 0.125
"""Heights of the reference box that a mixture's coordinates are measured in: about the scatter of a border."""

PAPER_NOISE = box_noise((0.03, 0.1, 0.3))
"""As in the papers: all four coordinates move by one scale, in sides of the box, from the scatter of an annotation to
the distance of the two lengths."""
NEAR, FAR = 0.6, 8.0
BORDER_NOISE = GaussianNoise(
    [(NEAR,) * 4, (4 * NEAR,) * 4, *([FAR if i == j else NEAR for j in range(4)] for i in range(4))]
)
"""The same range, but it is one border that moves far, and the others stay near; as for :class:`Borders`. A random box
that differs from the annotated one in a single border is what tells two places of that border apart."""
SAMPLES, PROPOSED = 32, 16
"""Noise samples of a box: around the annotated one, and from a mixture, which knows where to look."""

Network = MixtureNetwork | EnergyNetwork | MixtureEnergyNetwork

METHODS: dict[str, Callable[[], Network]] = {
    "gaussian": lambda: MixtureNetwork(1),
    "mixture-2": lambda: MixtureNetwork(2),
    "mixture-4": lambda: MixtureNetwork(4),
    "nce": lambda: EnergyNetwork(objectives.NCE(BORDER_NOISE, SAMPLES), Borders),
    "mixture-2-nce": lambda: MixtureEnergyNetwork(2, objectives.NCEWithLearnedProposal(PROPOSED, 0.0, 1.0)),
    "nce-papers": lambda: EnergyNetwork(objectives.NCE(PAPER_NOISE, SAMPLES), BoxSpace),
}
"""In the order of work."""
TITLES = {
    "truth": "true density", "gaussian": "Gaussian regression", "mixture-2": "mixture of two Gaussians",
    "mixture-4": "mixture of four Gaussians", "nce": "energy head, NCE, one border moves far",
    "mixture-2-nce": "energy head on a mixture of two, NCE", "nce-papers": "energy head, NCE, noise as in the papers",
}  # fmt: skip


# Training -------------------------------------------------------------------------------------------------------------

STEPS, BATCH, RATE = 1600, 32, 1e-3
"""Steps of a training, scenes of a step, which are new ones in every step, and largest learning rate of Adam."""
TEST, TEST_SEED = 400, 10_000
"""Scenes that are judged, the same for all, and their seed."""


def train(method: str, seed: int, steps: int) -> Network:
    """A trained network, in evaluation mode."""
    torch.manual_seed(seed)
    model = METHODS[method]()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(steps):
        loss = model.loss(draw(BATCH, generator), generator).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


# What the densities say -----------------------------------------------------------------------------------------------

NODES, DRAWS = 96, 24
"""Nodes along the right border, and draws of the other three for each node; two passes before, which find out how far
those spread, have a quarter of them."""
CHUNK = 25
"""Scenes that are judged at once."""


@dataclass(frozen=True)
class Judged:
    """A density in each of B scenes.

    Attributes:
        log_prob: At the annotated box, in nats per pixel⁴, shape (B,).
        places: Where the density of the right border is known, in pixels, shape (G, B).
        density: There, per pixel, shape (G, B).
        best: The box of the highest density, shape (B, 4).
        effective: Draws that the weighted ones are worth, shape (B,); infinite where nothing is drawn.
    """

    log_prob: Tensor
    places: Tensor
    density: Tensor
    best: Tensor
    effective: Tensor

    def long_mass(self, scenes: Scenes) -> Tensor:
        """Probability of a right border beyond the middle of the two places, shape (B,)."""
        beyond = self.places > scenes.rights.mean(1)
        step = self.places[1] - self.places[0]
        return (self.density * beyond).sum(0) * step


def _range(scenes: Scenes, count: int) -> tuple[Tensor, Tensor]:
    """Nodes along the right border and their distance: from well before the nearer place to far beyond the other."""
    height = scenes.reference[:, 3] - scenes.reference[:, 1]
    low, high = scenes.reference[:, 0] + 0.8 * height, scenes.reference[:, 0] + 4.4 * height
    step = (high - low) / count
    return low + step * (torch.arange(count)[:, None] + 0.5), step


@torch.no_grad()
def judge_mixture(model: MixtureNetwork, scenes: Scenes) -> Judged:
    """All of it in closed form."""
    q, space = model.distribution(scenes), Borders(scenes.reference)
    x, _ = _range(scenes, NODES)
    right = space.to_model(x[..., None].expand(-1, -1, 4))[..., 2:3]  # (G, B, 1)
    part = (right - q.means[..., 2]) / q.scales[..., 2]
    log_part = -0.5 * part.square() - q.scales[..., 2].log() - 0.5 * math.log(2 * math.pi) + q.log_mixing
    density = log_part.exp().sum(-1) * (space.log_abs_det_jacobian(x) / 4).exp()
    centres = q.means.transpose(0, 1)  # (K, B, 4)
    best = q.log_prob(centres).argmax(0)
    top = space.to_user(centres[best, torch.arange(len(best))])
    return Judged(model.log_prob(scenes, scenes.boxes), x, density, top, torch.full((len(x[0]),), math.inf))


@torch.no_grad()
def judge_energy(model: EnergyNetwork | MixtureEnergyNetwork, scenes: Scenes, generator: torch.Generator) -> Judged:
    """Quadrature along the right border, importance sampling of the other three.

    They are drawn from a wide Gaussian, so that no mass is overlooked, and from one that is fitted to the weighted
    points of the pass before. Nodes along the right border are shifted at random, so that Z's estimate has no bias.
    """
    count = len(scenes.boxes)
    log_density = model.log_density(scenes)
    height = scenes.reference[:, 3] - scenes.reference[:, 1]
    middle = scenes.reference[:, [0, 1, 3]]
    wide = (2 * PROPOSAL * height)[:, None].expand(-1, 3)
    mean, spread = middle, wide
    nodes, step = _range(scenes, NODES)
    for draws in (DRAWS // 4, DRAWS // 4, DRAWS):
        narrow = torch.arange(draws)[:, None, None, None] >= draws // 4
        shift = torch.rand(draws, 1, count, generator=generator) - 0.5
        x = nodes + step * shift  # (S, G, B)
        noise = torch.randn(draws, NODES, count, 3, generator=generator)
        others = torch.where(narrow, mean + spread * noise, middle + wide * noise)
        share = (draws // 4) / draws
        log_q = torch.logaddexp(
            math.log(share) + _log_gaussian(others, middle, wide),
            math.log(1 - share) + _log_gaussian(others, mean, spread),
        )
        boxes = torch.stack([others[..., 0], others[..., 1], x, others[..., 2]], -1)
        values = log_density(boxes)
        log_weights = (values - log_q + step.log() - math.log(draws)).flatten(0, 1)
        weights = log_weights.softmax(0)
        points = others.flatten(0, 1)
        mean = (weights[..., None] * points).sum(0)
        variance = (weights[..., None] * (points - mean).square()).sum(0)
        spread = 1.3 * variance.sqrt().clamp_min(0.1)
    density = weights.view(DRAWS, NODES, count).sum(0) / step
    best = boxes.flatten(0, 1)[values.flatten(0, 1).argmax(0), torch.arange(count)]
    top = refine(log_density, best, num_steps=20, step_size=0.5 * ANNOTATION**2)
    log_prob = log_density(scenes.boxes) - log_weights.logsumexp(0)
    return Judged(log_prob, nodes, density, top, 1 / weights.square().sum(0))


def _log_gaussian(x: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    return (-0.5 * ((x - mean) / spread).square() - spread.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def judge(model: Network, scenes: Scenes, seed: int) -> Judged:
    """What the model's densities say, scene by scene."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(scenes.boxes), CHUNK):
        some = scenes[start : start + CHUNK]
        if isinstance(model, EnergyNetwork | MixtureEnergyNetwork):
            parts.append(judge_energy(model, some, generator))
        else:
            parts.append(judge_mixture(model, some))
    return Judged(*(torch.cat([getattr(part, name) for part in parts], -1 if name != "best" else 0)
                    for name in ("log_prob", "places", "density", "best", "effective")))  # fmt: skip


def scores(judged: Judged, scenes: Scenes) -> dict[str, Any]:
    """Numbers for JSON, for hidden ends and for seen ones.

    "nll" is that of the annotated boxes, and "kl" what it is above that of the true density on the same boxes, with its
    standard error over scenes. "mass_error" is the mean distance of the probability of a long bar from the true one;
    "iou" that of the densest box with the annotated one.
    """
    found: dict[str, Any] = {}
    nll, truth = -judged.log_prob.double(), -scenes.log_prob(scenes.boxes).double()
    mass = judged.long_mass(scenes)
    iou = paired_iou(judged.best, scenes.boxes)
    for name, rows in (("hidden", scenes.hidden), ("seen", ~scenes.hidden)):
        excess = (nll - truth)[rows]
        found[name] = {
            "scenes": int(rows.sum()), "nll": float(nll[rows].mean()), "truth": float(truth[rows].mean()),
            "kl": float(excess.mean()), "kl_se": float(excess.std() / math.sqrt(int(rows.sum()))),
            "mass_error": float((mass - scenes.chances[:, 1])[rows].abs().mean()),
            "iou": float(iou[rows].mean()), "both": _both(judged, scenes, rows),
            "effective": float(judged.effective[rows].quantile(0.05)),
        }  # fmt: skip
        if not math.isfinite(found[name]["effective"]):
            found[name]["effective"] = None
    found["masses"] = [
        [round(float(p), 4), round(float(m), 4)]
        for p, m in zip(scenes.chances[scenes.hidden, 1], mass[scenes.hidden], strict=True)
    ]
    return found


def _both(judged: Judged, scenes: Scenes, rows: Tensor) -> float:
    """Share of scenes whose density shows both places.

    Each has a peak within two pixels, with at least half of its true probability around it, and between the peaks the
    density falls below half of the lower one.
    """
    x, density = judged.places[:, rows], judged.density[:, rows]
    rights, chances = scenes.rights[rows], scenes.chances[rows]
    around = [torch.where((x - place).abs() < 2, density, 0.0) for place in rights.unbind(1)]
    masses = torch.stack([each.sum(0) for each in around], 1) * (x[1] - x[0])[:, None]
    between = (x > rights[:, 0] + 2) & (x < rights[:, 1] - 2)
    valley = torch.where(between, density, math.inf).amin(0)
    peaks = torch.stack([each.amax(0) for each in around]).amin(0)
    return float(((masses >= 0.5 * chances).all(1) & (valley < 0.5 * peaks)).float().mean())


PICTURED = 4
"""Scenes with a hidden end in the picture, and one with a seen end."""


def pictured(scenes: Scenes) -> list[int]:
    """Numbers of the scenes of the picture."""
    order = scenes.hidden.nonzero()[:, 0]
    by_chance = order[scenes.chances[order, 1].argsort()]
    ends = torch.linspace(0, len(order) - 1, PICTURED).long()
    return [*by_chance[ends].tolist(), int((~scenes.hidden).nonzero()[0])]


def test_scenes() -> Scenes:
    """The scenes that all are judged on."""
    return draw(TEST, torch.Generator().manual_seed(TEST_SEED))


# Running --------------------------------------------------------------------------------------------------------------

Piece = tuple[str, int]


def do(piece: Piece, steps: int) -> dict[str, Any]:
    """Train and judge: a record for JSON."""
    method, seed = piece
    started = time.process_time()
    model = train(method, seed, steps)
    seconds = time.process_time() - started
    scenes = test_scenes()
    judged = judge(model, scenes, seed)
    record = {
        "method": method, "seed": seed, "steps": steps, **scores(judged, scenes), "fit_cpu_seconds": round(seconds, 1),
        "torch": torch.__version__, "cpu": describe_machine()["processor"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip
    if seed == 0:
        chosen = pictured(scenes)
        record["picture"] = {
            "places": np.round(judged.places[:, chosen].T.numpy(), 2).tolist(),
            "density": np.round(judged.density[:, chosen].T.numpy(), 5).tolist(),
        }
    return record


def _work(pieces: Sequence[Piece], steps: int, results: Path) -> bool:
    torch.set_num_threads(1)

    def one(piece: Piece) -> tuple[str, str]:
        record = do(piece, steps)
        hidden, seen = record["hidden"], record["seen"]
        return json.dumps(record) + "\n", f"NLL {hidden['nll']:.3f} hidden, {seen['nll']:.3f} seen"

    return do_each(pieces, lambda piece: results / piece[0] / f"{piece[1]}.json", lambda piece: f"{piece[0]} "
                   f"{piece[1]}", one)  # fmt: skip


def run(methods: Sequence[str], seeds: int, steps: int = STEPS, results: Path = RESULTS, jobs: int = 1) -> bool:
    """Make all results that are not there; return whether nothing went wrong."""
    pieces = [(method, seed) for seed in range(seeds) for method in methods]
    return in_processes(partial(_work, pieces, steps, results), jobs)


STEPS_TEXT = "Each method has the same backbone, layers behind it, {steps} steps of {batch} new scenes, and seeds."
READING = f"""Written by `python -m experiments.detection.scenes report`. What is drawn: [scenes.py](../../scenes.py).

NLL is that of {TEST} annotated boxes, in nats per pixel⁴; the true density has the least that is to be had. All are
means over seeds, with standard errors over seeds where there are several. "Both places": share of the scenes with a
hidden end whose density has a peak at either place of that border, with at least half of its true probability, and a
valley between them. "Error of P(long)": mean distance of the probability of the farther place from the true one. IoU is
that of the densest box with the annotated one; a short bar and a long one have {SHORT / LONG:.2f}."""


# The report -----------------------------------------------------------------------------------------------------------


def read(results: Path) -> dict[str, list[dict[str, Any]]]:
    """Records of each method, in the order of the seeds."""
    found = {method: [json.loads(path.read_text()) for path in sorted((results / method).glob("*.json"))]
             for method in METHODS}  # fmt: skip
    return {method: records for method, records in found.items() if records}


def _text(values: Sequence[float], digits: int = 2) -> str:
    array = np.array(values)
    error = f" ± {array.std(ddof=1) / math.sqrt(len(array)):.{digits}f}" if len(array) > 1 else ""
    return f"{array.mean():.{digits}f}{error}"


def table(records: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of the table: means over seeds, with their standard errors."""
    first = next(iter(records.values()))[0]
    lines = [
        "| method | seeds | NLL, end hidden | NLL, end seen | both places | error of P(long) | IoU, hidden "
        "| IoU, seen |",
        "|---|---|---|---|---|---|---|---|",
        f"| {TITLES['truth']} | | {first['hidden']['truth']:.2f} | {first['seen']['truth']:.2f} | 1.00 | 0 | | |",
    ]
    for method, each in records.items():
        hidden, seen = ([record[part] for record in each] for part in ("hidden", "seen"))
        cells = [
            TITLES[method], str(len(each)), _text([part["nll"] for part in hidden]),
            _text([part["nll"] for part in seen]), f"{np.mean([part['both'] for part in hidden]):.2f}",
            _text([part["mass_error"] for part in hidden], 3), _text([part["iou"] for part in hidden], 3),
            _text([part["iou"] for part in seen], 3),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw_picture(records: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Scenes, and the density of the right border by three methods."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    scenes = test_scenes()
    chosen = pictured(scenes)
    figure, axes = pyplot.subplots(2, len(chosen), figsize=(2.5 * len(chosen), 4.6), dpi=110, sharex="col",
                                   gridspec_kw={"height_ratios": [1.35, 1]})  # fmt: skip
    styles = {
        "gaussian": ("tab:blue", "-", "Gaussian regression"),
        "mixture-2": ("tab:green", "-", "mixture of two Gaussians"),
        "mixture-2-nce": ("tab:orange", "-", "energy head on the mixture"),
        "nce": ("tab:red", ":", "energy head by itself"),
    }
    fine = torch.linspace(0, SIDE, 512)[:, None].expand(-1, len(scenes.boxes))
    truth = scenes.right_density(fine)
    for place, number in enumerate(chosen):
        above, below = axes[0, place], axes[1, place]
        above.imshow(
            scenes.images[number].permute(1, 2, 0).clamp(0, 1).numpy(), extent=(0, SIDE, SIDE, 0), aspect="auto"
        )
        left, top, bottom = scenes.places[number].tolist()
        for right, chance in zip(scenes.rights[number].tolist(), scenes.chances[number].tolist(), strict=True):
            if chance:
                above.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color="black",
                                          linewidth=1.2, linestyle="--"))  # fmt: skip
        hidden = bool(scenes.hidden[number])
        above.set_title(f"end hidden\nP(long) = {scenes.chances[number, 1]:.2f}" if hidden else "end seen\n",
                        fontsize=9)  # fmt: skip
        above.set_axis_off()
        below.fill_between(fine[:, number].numpy(), truth[:, number].numpy(), color="0.85", label="truth")
        for method, (colour, line, label) in styles.items():
            if method in records and "picture" in records[method][0]:
                kept = records[method][0]["picture"]
                below.plot(
                    kept["places"][place],
                    kept["density"][place],
                    color=colour,
                    linestyle=line,
                    linewidth=1.4,
                    label=label,
                )
        below.set_xlim(0, SIDE)
        below.set_ylim(0, 1.15 * float(truth[:, number].max()))
        below.set_yticks([])
        below.set_xlabel("right border (px)", fontsize=8)
        below.tick_params(labelsize=8)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def report(results: Path = RESULTS, picture: Path | None = PICTURE) -> str:
    """Write the table to `results/README.md`, and the picture; return the table.

    Raises:
        ValueError: There are no results.
    """
    records = read(results)
    if not records:
        raise ValueError(f"There are no results in {results}; make them: python -m experiments.detection.scenes run")
    text = "\n".join(table(records)) + "\n"
    first = next(iter(records.values()))[0]
    facts = (
        f"{STEPS_TEXT.format(steps=first['steps'], batch=BATCH)} Measured on {first['cpu']}, one thread, PyTorch "
        f"{first['torch']}, {first['date']}."
    )
    page = f"# Boxes with a border that is hidden at random\n\n{READING}\n\n{facts}\n\n{text}"
    write_atomically(results / "README.md", page.encode())
    if picture is not None:
        draw_picture(records, picture)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(prog="python -m experiments.detection.scenes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="train and judge everything that has no result yet")
    command.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--steps", type=int, default=STEPS)
    command.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    written = commands.add_parser("report", help="the table and the picture from the results")
    written.add_argument("--picture", type=Path, default=PICTURE)
    for each in (command, written):
        each.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.command == "report":
        print(report(arguments.results, arguments.picture), end="")
        return 0
    return 0 if run(arguments.methods, arguments.seeds, arguments.steps, arguments.results, arguments.jobs) else 1


if __name__ == "__main__":
    raise SystemExit(main())
