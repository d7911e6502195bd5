"""The papers' small networks, S of them side by side, one for each seed.

Everything is feature-major: hidden tensors have shape (S, width, N) with the N points of a seed contiguous, so that a
layer of all seeds is one batched matrix product. The rows that an objective sees are the seeds' batches one after the
other: row s B + b is example b of seed s. An objective knows nothing of this, and neither does Adam, which works
element by element; S trainings in one are S separate trainings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from energyreg.densities.mixtures import GaussianMixture
from experiments.one_dimensional.fused import extension, fused_energy

__all__ = ["ConditionalMixture", "EnergyNetwork", "Linear", "MixtureHead", "Model", "XBranch", "tanh_network"]

WIDTH = 10


class Linear(nn.Module):
    """S layers `nn.Linear` side by side, each with torch's default initialisation from its own generator.

    Args:
        generators: One for each seed.
        fan_in: Input channels I.
        fan_out: Output channels O.
    """

    def __init__(self, generators: Sequence[Generator], fan_in: int, fan_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(fan_in)

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(
                torch.stack([torch.empty(shape).uniform_(-bound, bound, generator=g) for g in generators])
            )

        self.weight, self.bias = uniform(fan_out, fan_in), uniform(fan_out, 1)

    def forward(self, h: Tensor) -> Tensor:
        """Map (S, I, N) to (S, O, N)."""
        return torch.baddbmm(self.bias, self.weight, h)


class XBranch(nn.Module):
    """Linear-ReLU-Linear-ReLU on a scalar x, (S, 1, B) to (S, 10, B)."""

    def __init__(self, generators: Sequence[Generator]) -> None:
        super().__init__()
        self.first, self.second = Linear(generators, 1, WIDTH), Linear(generators, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu_()).relu_()


class EnergyNetwork(nn.Module):
    """f(x, y) of paper IV's toy problems, with ReLU throughout; :func:`tanh_network` is that of paper II.

    Args:
        generators: One for each seed.
        activation: Of the y-branch and the joint layers; may work in place.
        y_layers: Layers of the y-branch.
        joint_layers: Hidden layers on the features of x and y; from the second on each is added to its input.
        normaliser: Whether to subtract b(x), linear in the features of x, from f.
        fused: Whether to run compiled where that is possible; f is then differentiable once only.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        activation: Callable[[Tensor], Tensor] = torch.relu_,
        y_layers: int = 2,
        joint_layers: int = 2,
        normaliser: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.activation, self.fused = activation, fused
        self.x_branch = XBranch(generators)
        self.y_branch = nn.ModuleList([Linear(generators, WIDTH if i else 1, WIDTH) for i in range(y_layers)])
        self.joint = Linear(generators, 2 * WIDTH, WIDTH)
        self.residual = nn.ModuleList([Linear(generators, WIDTH, WIDTH) for _ in range(joint_layers - 1)])
        self.output = Linear(generators, WIDTH, 1)
        self.normaliser = Linear(generators, WIDTH, 1) if normaliser else None

    def forward(self, features: Tensor) -> Callable[[Tensor], Tensor]:
        """Return f(x, ·) for features of x of shape (S, 10, B): y of shape (*M, S B, 1) to (*M, S B)."""
        s, _, b = features.shape
        # What x gives to the first joint layer is computed once and shared by all y.
        weight_x, weight_y = self.joint.weight.split(WIDTH, -1)
        from_x = torch.baddbmm(self.joint.bias, weight_x, features)[..., None]
        log_b = None if self.normaliser is None else self.normaliser(features)[:, 0, :, None]

        def f(y: Tensor) -> Tensor:
            points = y.reshape(-1, s, b).permute(1, 2, 0)  # (S, B, M)
            if self.fused and points.dtype == torch.float32 and extension() is not None:
                values = self._fused(from_x[..., 0], points)
                values = values if log_b is None else values - log_b
                return values.permute(2, 0, 1).reshape(y.shape[:-1])
            h = points.reshape(s, 1, -1)
            for layer in self.y_branch:
                h = self.activation(layer(h))
            h = torch.bmm(weight_y, h).unflatten(-1, points.shape[1:]).add_(from_x).flatten(-2)
            h = self.activation(h)
            for layer in self.residual:
                h = self.activation(layer(h)) + h
            values = self.output(h).reshape(points.shape)
            values = values if log_b is None else values - log_b
            return values.permute(2, 0, 1).reshape(y.shape[:-1])

        return f

    def _fused(self, from_x: Tensor, points: Tensor) -> Tensor:
        _, weight_y = self.joint.weight.split(WIDTH, -1)
        layers = [t for layer in self.y_branch for t in (layer.weight, layer.bias)]
        layers += [weight_y, *(t for layer in self.residual for t in (layer.weight, layer.bias))]
        layers += [self.output.weight, self.output.bias]
        parameters = torch.cat([t.flatten(1) for t in layers], 1)
        return fused_energy(parameters, from_x, points, y_layers=len(self.y_branch),
                            residual_layers=len(self.residual), tanh=self.activation is torch.tanh_)  # fmt: skip


def tanh_network(generators: Sequence[Generator], fused: bool = True) -> EnergyNetwork:
    """f(x, y) of papers I and II on their toy problems."""
    return EnergyNetwork(generators, torch.tanh_, y_layers=1, joint_layers=3, fused=fused)


class MixtureHead(nn.Module):
    """A mixture of K Gaussians from features of x, by three networks of two layers, as in paper IV.

    Args:
        generators: One for each seed.
        num_components: Gaussians K.
    """

    def __init__(self, generators: Sequence[Generator], num_components: int) -> None:
        super().__init__()

        def network() -> nn.Sequential:
            return nn.Sequential(
                Linear(generators, WIDTH, WIDTH), nn.ReLU(inplace=True), Linear(generators, WIDTH, num_components)
            )

        self.means, self.log_variances, self.logits = network(), network(), network()

    def forward(self, features: Tensor) -> GaussianMixture:
        """Return the mixtures of S B rows for features of shape (S, 10, B)."""

        def rows(output: Tensor) -> Tensor:
            return output.mT.flatten(0, 1)

        scales = (0.5 * rows(self.log_variances(features))).exp()
        return GaussianMixture(rows(self.logits(features)), rows(self.means(features))[..., None], scales[..., None])


class ConditionalMixture(nn.Module):
    """A mixture density network with its own x-branch."""

    def __init__(self, generators: Sequence[Generator], num_components: int) -> None:
        super().__init__()
        self.x_branch, self.head = XBranch(generators), MixtureHead(generators, num_components)

    def forward(self, x: Tensor) -> GaussianMixture:
        """Return the mixtures for x of shape (S, 1, B)."""
        return self.head(self.x_branch(x))


class Model(nn.Module):
    """x to the energy function f and the proposal q, as objectives take them.

    Args:
        energy: f, or None.
        proposal: q: a head on the detached features of f's x-branch, a network of its own, or None.
    """

    def __init__(self, energy: EnergyNetwork | None, proposal: MixtureHead | ConditionalMixture | None = None) -> None:
        super().__init__()
        self.energy, self.proposal = energy, proposal

    def forward(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, GaussianMixture | None]:
        """Return f and q for x of shape (S, B)."""
        x, f, q = x[:, None], None, None
        if self.energy is not None:
            features = self.energy.x_branch(x)
            f = self.energy(features)
        if isinstance(self.proposal, MixtureHead):
            q = self.proposal(features.detach())
        elif self.proposal is not None:
            q = self.proposal(x)
        return f, q
