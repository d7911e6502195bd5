"""Energy heads on vectors: (context, v) to g, where v holds the target's unit coordinates scaled to (-1, 1).

A head takes v of shape (*S, B, D) and returns (*S, B); v of shape (*S, 1, D) means targets shared by all rows. Any
module that does so is a head. Both heads here start at g = 0, so that the model starts as its base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from energyreg.checks import check_count

__all__ = ["EdgeHead", "JointHead", "SelfNormalisedHead", "SeparableHead", "TargetEmbedding"]


BLOCK_FLOATS = 2**18
"""Numbers in a hidden layer of one block of points: a megabyte, of which a few fit into the caches of a core."""

LOG_STEEPEST = 6.0
"""Log of the steepest slope of an edge, per unit of v: a step over 1/400 of the targets' range."""


class TargetEmbedding(nn.Module):
    """Periodic features of the target's coordinates, with learned frequencies; whole harmonics for an angle.

    Args:
        dim: Target dimensions D.
        periodic: Whether each dimension is an angle, so that the features agree at v = -1 and v = 1; none by default.
        num_frequencies: Frequencies per dimension.
        frequency_scale: Standard deviation of the initial frequencies, in periods per unit of v.

    Source:
        Gorishniy et al., "On embeddings for numerical features in tabular deep learning", NeurIPS 2022 (periodic
        features).
    """

    harmonics: Tensor
    angle: Tensor

    def __init__(
        self,
        dim: int = 1,
        periodic: Sequence[bool] | None = None,
        num_frequencies: int = 16,
        frequency_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.dim, self.periodic = dim, (False,) * dim if periodic is None else tuple(bool(flag) for flag in periodic)
        self.num_frequencies, self.frequency_scale = num_frequencies, frequency_scale
        self.frequencies = nn.Parameter(2 * math.pi * frequency_scale * torch.randn(dim, num_frequencies))
        self.register_buffer(
            "harmonics", torch.arange(1, num_frequencies + 1).expand(dim, -1).clone(), persistent=False
        )
        self.register_buffer("angle", torch.tensor(self.periodic)[:, None], persistent=False)
        self.out_features = dim * (2 * num_frequencies + 1)

    def forward(self, v: Tensor) -> Tensor:
        """Map v of shape (*S, D) to features (*S, out_features)."""
        if any(self.periodic):
            phase = v[..., None] * torch.where(self.angle, math.pi * self.harmonics.to(v.dtype), self.frequencies)
            linear = torch.where(self.angle[:, 0], torch.zeros_like(v), v)
        else:
            phase, linear = v[..., None] * self.frequencies, v
        return torch.cat([linear, phase.sin().flatten(-2), phase.cos().flatten(-2)], -1)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        check_count(name, size)


class SeparableHead(nn.Module):
    r"""The separable head g(x, y) = ⟨a(context), φ(y)⟩ + b(y).

    For G targets shared by all B rows φ is evaluated G times, and all G x B values are one matrix product.

    Args:
        context_dim: Context channels C.
        dim: Target dimensions D.
        periodic: Whether each dimension is an angle; none by default.
        channels: Length of a and φ.
        width: Width of the hidden layers.
        num_frequencies: Frequencies of the target's embedding per dimension.
        frequency_scale: Their initial standard deviation, in periods per unit of v.

    Raises:
        ValueError: If a size is smaller than one.

    >>> head = SeparableHead(context_dim=8)
    >>> context, grid = torch.randn(5, 8), torch.linspace(-1, 1, 32)[:, None, None]
    >>> head(context, grid).shape
    torch.Size([32, 5])
    """

    def __init__(
        self,
        context_dim: int,
        dim: int = 1,
        periodic: Sequence[bool] | None = None,
        channels: int = 64,
        width: int = 128,
        num_frequencies: int = 16,
        frequency_scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check_sizes(context_dim=context_dim, dim=dim, channels=channels, width=width, num_frequencies=num_frequencies)
        self.context_dim, self.dim, self.periodic = context_dim, dim, periodic if periodic is None else tuple(periodic)
        self.channels, self.width = channels, width
        self.num_frequencies, self.frequency_scale = num_frequencies, frequency_scale
        self.context_map = nn.Linear(context_dim, channels)
        embedding = TargetEmbedding(dim, periodic, num_frequencies, frequency_scale)
        self.target_map = nn.Sequential(
            embedding,
            nn.Linear(embedding.out_features, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, channels + 1),
        )  # fmt: skip
        nn.init.zeros_(self.context_map.weight)
        nn.init.zeros_(self.context_map.bias)
        last = self.target_map[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():  # b(y) = 0 at the start
            last.weight[-1] = 0
            last.bias[-1] = 0

    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of g, in floats; what chunks are sized by."""
        return 2 if shared else 4 * self.width

    def forward(self, context: Tensor, v: Tensor) -> Tensor:
        """Return g of shape (*S, B) for contexts (B, C) and coordinates (*S, B, D) or (*S, 1, D)."""
        a, phi = self._context(context), self.target_map(v)
        if v.shape[-2] == 1 and context.shape[0] > 1:
            return phi[..., 0, :] @ a.T
        return (phi * a).sum(-1)

    def own_and_shared(self, context: Tensor, own: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Return g at one target of each row's own and at targets shared by all rows, in one pass through φ.

        Args:
            context: Shape (B, C).
            own: Coordinates (B, D).
            shared: Coordinates (G, 1, D).

        Returns:
            Shapes (B,) and (G, B), as from two calls.
        """
        a = self._context(context)
        phi_own, phi_shared = self.target_map(torch.cat([own, shared[:, 0]])).split([len(own), len(shared)])
        return (phi_own * a).sum(-1), phi_shared @ a.T

    def _context(self, context: Tensor) -> Tensor:
        """a(context), and a one for b, which is the last channel of φ, shape (B, channels + 1)."""
        return functional.pad(self.context_map(context) * (4 / math.sqrt(self.channels)), (0, 1), value=1.0)


class JointHead(nn.Module):
    """The joint head: context and target mixed in a network, as in the papers.

    The first layer is split into a projection of the context, once per x, and one of the target's embedding, once per
    y.

    Args:
        context_dim: Context channels C.
        dim: Target dimensions D.
        periodic: Whether each dimension is an angle; none by default.
        width: Width of the hidden layers.
        depth: Residual layers after the first.
        num_frequencies: Frequencies of the target's embedding per dimension.
        frequency_scale: Their initial standard deviation, in periods per unit of v.
        blocks: Whether many points go through the hidden layers in blocks that stay in a processor's cache, which is
            faster and takes half the memory. The parameters' gradient is then not differentiable itself; a gradient in
            the targets always is.

    Raises:
        ValueError: If a size is smaller than one.
    """

    def __init__(
        self,
        context_dim: int,
        dim: int = 1,
        periodic: Sequence[bool] | None = None,
        width: int = 128,
        depth: int = 2,
        num_frequencies: int = 16,
        frequency_scale: float = 1.0,
        blocks: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(context_dim=context_dim, dim=dim, width=width, depth=depth, num_frequencies=num_frequencies)
        self.context_dim, self.dim, self.periodic = context_dim, dim, periodic if periodic is None else tuple(periodic)
        self.width, self.depth = width, depth
        self.num_frequencies, self.frequency_scale = num_frequencies, frequency_scale
        self.context_map = nn.Linear(context_dim, width)
        embedding = TargetEmbedding(dim, periodic, num_frequencies, frequency_scale)
        self.target_map = nn.Sequential(embedding, nn.Linear(embedding.out_features, width, bias=False))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.output = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.output.weight)
        self.blocks = blocks

    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of g, in floats; what chunks are sized by."""
        return 4 * self.width

    def forward(self, context: Tensor, v: Tensor) -> Tensor:
        """Return g of shape (*S, B) for contexts (B, C) and coordinates (*S, B, D) or (*S, 1, D)."""
        from_context, embedding = self.context_map(context), self.target_map[0](v)
        if self._in_blocks(from_context, v):
            parameters = [t for layer in self.layers for t in (layer.weight, layer.bias)]
            g = _ResidualNetwork.apply(
                from_context, embedding.flatten(0, -3), self.target_map[1].weight, self.output.weight, *parameters
            )
            return g.reshape(*v.shape[:-2], context.shape[0])
        hidden = functional.silu(from_context + self.target_map[1](embedding))
        for layer in self.layers:
            hidden = hidden + functional.silu(layer(hidden))
        return self.output(hidden)[..., 0]

    def _in_blocks(self, from_context: Tensor, v: Tensor) -> bool:
        """Whether the network runs block by block: on a processor with caches, for many points, once differentiable."""
        return (
            self.blocks
            and v.ndim > 2
            and from_context.device.type == "cpu"
            and v[..., 0].numel() // v.shape[-2] * len(from_context) * self.width >= 2 * BLOCK_FLOATS
            and not (v.requires_grad and torch.is_grad_enabled())
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
        )


class _ResidualNetwork(torch.autograd.Function):
    """The hidden layers of a joint head, a block of points at a time, forward and backward.

    A block's tensors stay in the cache and its intermediate results are overwritten; only what goes into each
    activation is kept for the gradient, half of what autograd would keep.

    Its arguments: what the context gives to the first layer, its bias included, shape (B, W); the embedded
    targets, (M, B, E) or (M, 1, E); the weight of the first layer for them, (W, E), and of the output, (1, W); weight
    and bias of each residual layer. Its value: g of shape (M, B).
    """

    @staticmethod
    def forward(
        ctx: Any, from_context: Tensor, embedding: Tensor, first: Tensor, output: Tensor, *layers: Tensor
    ) -> Tensor:
        m, (b, width) = len(embedding), from_context.shape
        depth, step = len(layers) // 2, max(BLOCK_FLOATS // (b * width), 1)
        g = from_context.new_empty(m, b)
        keep = any(ctx.needs_input_grad)
        kept = from_context.new_empty(depth + 1, m if keep else step, b, width)
        hidden, change = from_context.new_empty(2, step, b, width)
        for start in range(0, m, step):
            stop = min(start + step, m)
            count = stop - start
            inputs = kept[:, start:stop] if keep else kept[:, :count]
            h, s = hidden[:count].view(-1, width), change[:count].view(-1, width)
            e = embedding[start:stop]
            if e.shape[1] == b:
                torch.mm(e.reshape(-1, e.shape[-1]), first.T, out=inputs[0].view(-1, width))
                inputs[0] += from_context
            else:
                torch.add(e @ first.T, from_context, out=inputs[0])
            _silu(inputs[0].view(-1, width), h)
            for layer in range(depth):
                z = inputs[layer + 1].view(-1, width)
                torch.addmm(layers[2 * layer + 1], h, layers[2 * layer].T, out=z)
                h += _silu(z, s)
            torch.mv(h, output[0], out=g[start:stop].view(-1))
        ctx.save_for_backward(kept if keep else None, from_context, embedding, first, output, *layers)
        return g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_g: Tensor) -> tuple[Tensor | None, ...]:
        kept, from_context, embedding, first, output, *layers = ctx.saved_tensors
        m, (b, width) = len(embedding), from_context.shape
        depth, step = len(layers) // 2, max(BLOCK_FLOATS // (b * width), 1)
        own = embedding.shape[1] == b
        gradients = [torch.zeros_like(t) for t in (from_context, first, output, *layers)]
        d_from_context, d_first, d_output, *d_layers = gradients
        d_embedding = torch.empty_like(embedding) if ctx.needs_input_grad[1] else None
        buffers = from_context.new_empty(depth + 4, step * b, width)
        d_g = d_g.contiguous()
        for start in range(0, m, step):
            stop = min(start + step, m)
            points = (stop - start) * b
            *h, d, slope, work = (buffer[:points] for buffer in buffers)
            z = [kept[layer, start:stop].view(-1, width) for layer in range(depth + 1)]
            _silu(z[0], h[0])
            for layer in range(1, depth + 1):
                torch.add(h[layer - 1], _silu(z[layer], work), out=h[layer])
            part = d_g[start:stop].view(-1, 1)
            d_output.addmm_(part.T, h[depth])
            torch.mul(part, output, out=d)
            for layer in range(depth, 0, -1):
                torch.ops.aten.silu_backward.grad_input(d, z[layer], grad_input=slope)
                weight = layers[2 * layer - 2]
                d_layers[2 * layer - 2].addmm_(slope.T, h[layer - 1])
                d_layers[2 * layer - 1] += slope.sum(0)
                d.addmm_(slope, weight)
            torch.ops.aten.silu_backward.grad_input(d, z[0], grad_input=slope)
            by_row = slope.view(-1, b, width)
            d_from_context += by_row.sum(0)
            if own:
                d_first.addmm_(slope.T, embedding[start:stop].reshape(points, -1))
                if d_embedding is not None:
                    torch.mm(slope, first, out=d_embedding[start:stop].view(points, -1))
            else:
                shared = by_row.sum(1)
                d_first.addmm_(shared.T, embedding[start:stop, 0])
                if d_embedding is not None:
                    torch.mm(shared, first, out=d_embedding[start:stop, 0])
        return d_from_context, d_embedding, d_first, d_output, *d_layers


def _silu(z: Tensor, out: Tensor) -> Tensor:
    """SiLU into memory that is there."""
    return torch.ops.aten.silu.out(z, out=out)


class EdgeHead(nn.Module):
    r"""Moving edges: soft steps in the target whose places, slopes and heights depend on the context (D = 1).

    .. math:: g(x, y) = \sum_j h_j(x) \tanh\left(s_j(x) (v - e_j(x))\right) + \text{head}(x, y)

    For densities with sharp borders that move with x, such as slabs, holes and steps, which a separable head would need
    very many channels for, and a mixture very many Gaussians. It costs B × G × J evaluations of tanh. It knows no
    circle: on an angle its density breaks at the cut.

    Args:
        context_dim: Context channels C.
        num_edges: Edges J.
        slope: Initial slope s, per unit of v; a larger one sees finer structure.
        head: Another head to add, or None.

    Raises:
        ValueError: If a size is smaller than one or slope is not > 0.

    >>> head = EdgeHead(context_dim=8)
    >>> head(torch.randn(5, 8), torch.linspace(-1, 1, 32)[:, None, None]).shape
    torch.Size([32, 5])
    """

    def __init__(self, context_dim: int, num_edges: int = 32, slope: float = 20.0, head: nn.Module | None = None):
        super().__init__()
        _check_sizes(context_dim=context_dim, num_edges=num_edges)
        if not 0 < slope < math.inf:
            raise ValueError(f"slope is {slope}; expected a finite number > 0.")
        self.context_dim, self.num_edges, self.slope, self.head = context_dim, num_edges, slope, head
        self.output = nn.Linear(context_dim, 3 * num_edges)
        with torch.no_grad():
            # Places spread over the targets, heights zero: g = 0 at the start.
            self.output.weight.mul_(0.3)
            self.output.weight[2 * num_edges :] = 0
            self.output.bias[:num_edges] = torch.linspace(-1, 1, num_edges)
            self.output.bias[num_edges : 2 * num_edges] = math.log(slope)
            self.output.bias[2 * num_edges :] = 0

    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of g, in floats; what chunks are sized by."""
        own = 4 * self.num_edges
        return own if self.head is None else own + getattr(self.head, "floats_per_point", lambda shared: 2048)(shared)

    def forward(self, context: Tensor, v: Tensor) -> Tensor:
        """Return g of shape (*S, B) for contexts (B, C) and coordinates (*S, B, 1) or (*S, 1, 1).

        Raises:
            ValueError: If the targets have more than one dimension.
        """
        if v.shape[-1] != 1:
            raise ValueError(f"v has {v.shape[-1]} dimensions; an EdgeHead is for one.")
        places, log_slopes, heights = self.output(context).split(self.num_edges, -1)
        slopes = log_slopes.clamp_max(LOG_STEEPEST).exp()
        g = (torch.tanh(torch.addcmul(-slopes * places, v, slopes)) * heights).sum(-1)
        return g if self.head is None else g + self.head(context, v)


class SelfNormalisedHead(nn.Module):
    """A head with a learned log-normaliser, g(x, y) - b(x), for the self-normalised likelihood.

    b is one linear layer on the context, and zero at the start.

    Args:
        head: Any head.
        context_dim: Context channels C.

    Raises:
        ValueError: If context_dim is smaller than one.

    Source:
        Senetaire et al., "Learning energy-based models by self-normalising the likelihood", arXiv 2503.07021.
    """

    def __init__(self, head: nn.Module, context_dim: int) -> None:
        super().__init__()
        _check_sizes(context_dim=context_dim)
        self.head, self.context_dim = head, context_dim
        self.log_normaliser = nn.Linear(context_dim, 1)
        nn.init.zeros_(self.log_normaliser.weight)
        nn.init.zeros_(self.log_normaliser.bias)

    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of g, in floats; what chunks are sized by."""
        return 1 + getattr(self.head, "floats_per_point", lambda shared: 2048)(shared)

    def forward(self, context: Tensor, v: Tensor) -> Tensor:
        """Return g - b of shape (*S, B) for contexts (B, C) and coordinates (*S, B, D) or (*S, 1, D)."""
        return self.head(context, v) - self.log_normaliser(context)[..., 0]
