"""The plain formulations that the library is measured against: the papers' own code, written as they write it.

The features of x are copied for every sample, joined with those of y, and all B (M + 1) rows go through the network
one by one; densities and the loss are computed with exp and log. Nothing here is used by the library.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from energyreg.networks.heads import JointHead
from experiments.one_dimensional.networks import WIDTH, EnergyNetwork
from experiments.one_dimensional.networks import Linear as StackedLinear

__all__ = ["JointNetwork", "ToyNetwork", "gaussian_mixture", "nce_loss", "sample_noise"]


class ToyNetwork(nn.Module):
    """The energy network of papers I and II on their toy problems."""

    def __init__(self) -> None:
        super().__init__()
        self.x1, self.x2 = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.y1 = nn.Linear(1, WIDTH)
        self.joint1, self.joint2 = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.joint3, self.joint4 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f of shape (B, M) for x of shape (B, 1) and y of shape (B, M)."""
        features = functional.relu(self.x2(functional.relu(self.x1(x))))
        batch, samples = y.shape
        features = features.view(batch, 1, WIDTH).expand(-1, samples, -1).reshape(batch * samples, WIDTH)
        of_y = torch.tanh(self.y1(y.reshape(batch * samples, 1)))
        h = torch.tanh(self.joint1(torch.cat((features, of_y), dim=1)))
        h = torch.tanh(self.joint2(h)) + h
        h = torch.tanh(self.joint3(h)) + h
        return self.joint4(h).view(batch, samples)

    @torch.no_grad()
    def copy_weights(self, network: EnergyNetwork) -> None:
        """Take the weights of the first seed of the experiments' network."""
        x, y, residual = network.x_branch, network.y_branch, network.residual
        theirs = (x.first, x.second, y[0], network.joint, residual[0], residual[1], network.output)
        mine = (self.x1, self.x2, self.y1, self.joint1, self.joint2, self.joint3, self.joint4)
        for layer, stacked in zip(mine, theirs, strict=True):
            assert isinstance(stacked, StackedLinear)
            layer.weight.copy_(stacked.weight[0])
            layer.bias.copy_(stacked.bias[0, :, 0])


class JointNetwork(nn.Module):
    """The network of a :class:`~energyreg.networks.heads.JointHead`, on joined features.

    Args:
        head: The head, for its sizes and weights.
    """

    def __init__(self, head: JointHead) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(head.target_map[0].frequencies.detach().clone())
        of_context, of_target = head.context_map, head.target_map[1]
        self.first = nn.Linear(of_context.in_features + of_target.in_features, head.width)
        self.layers = nn.ModuleList(nn.Linear(head.width, head.width) for _ in head.layers)
        self.output = nn.Linear(head.width, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([of_context.weight, of_target.weight], 1))
            self.first.bias.copy_(of_context.bias)
        for mine, theirs in zip([*self.layers, self.output], [*head.layers, head.output], strict=True):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, context: Tensor, v: Tensor) -> Tensor:
        """Return g of shape (B, M) for contexts (B, C) and coordinates (B, M, D)."""
        batch, samples, dim = v.shape
        rows = context.unsqueeze(1).expand(-1, samples, -1).reshape(batch * samples, -1)
        v = v.reshape(batch * samples, dim)
        phase = v.unsqueeze(-1) * self.frequencies
        embedding = torch.cat((v, torch.sin(phase).flatten(1), torch.cos(phase).flatten(1)), dim=1)
        h = functional.silu(self.first(torch.cat((rows, embedding), dim=1)))
        for layer in self.layers:
            h = h + functional.silu(layer(h))
        return self.output(h).view(batch, samples)


def gaussian_mixture(offset: Tensor, scales: Tensor) -> Tensor:
    """Density of a mixture of K centred Gaussians, offsets of shape (..., D) and scales of shape (K, D)."""
    components = torch.exp(-0.5 * (offset.unsqueeze(-2) / scales) ** 2) / (math.sqrt(2 * math.pi) * scales)
    return components.prod(-1).mean(-1)


def sample_noise(y: Tensor, scales: Tensor, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise around the targets, with one set of offsets for the whole batch, as the papers draw it.

    Args:
        y: Targets, shape (B, D).
        scales: Shape (K, D).
        num_samples: Samples M.

    Returns:
        Targets and samples, (B, M + 1, D), target first; density of the samples, (1, M); density of the target, (1, 1).
    """
    component = torch.randint(len(scales), (num_samples,), device=y.device)
    offset = scales[component] * torch.randn(num_samples, y.shape[1], device=y.device)
    points = y.unsqueeze(1) + torch.cat((torch.zeros_like(offset[:1]), offset)).unsqueeze(0)
    target = gaussian_mixture(torch.zeros_like(offset[:1]), scales)
    return points, gaussian_mixture(offset, scales).unsqueeze(0), target.unsqueeze(0)


def nce_loss(f: Tensor, density: Tensor, density_target: Tensor) -> Tensor:
    """NCE loss of each example from exponentials, (B,).

    Args:
        f: Values at the target and at the samples, shape (B, M + 1), target first.
        density: Density of the noise at the samples, shape (1 or B, M).
        density_target: Density of the noise at the target, shape (1 or B, 1).
    """
    positive = torch.exp(f[:, :1] - torch.log(density_target))
    noise = torch.exp(f[:, 1:] - torch.log(density))
    return -torch.log(positive / (positive + noise.sum(dim=1, keepdim=True))).squeeze(1)
