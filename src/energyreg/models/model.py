"""The model: an encoder run once per x, a head for many y, a base measure, a proposal and a target space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from energyreg import objectives
from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase
from energyreg.densities.ends import window
from energyreg.densities.spaces import Real, TargetSpace
from energyreg.inference.energy import EnergyFunction
from energyreg.inference.integrators import AdaptiveQuadrature, ImportanceSampling, StratifiedQuadrature
from energyreg.inference.row_blocks import KEPT_FRACTION, Rows, warn_if_unfitted
from energyreg.models.predictive import Integrator, PredictiveDistribution
from energyreg.models.table_defaults import FEW_ROWS, as_array, table_encoder, table_width
from energyreg.modes import as_usual
from energyreg.networks.encoders import TwinEncoder
from energyreg.networks.heads import JointHead, SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork

__all__ = ["EnergyRegressionModel"]

ENCODE_BYTES = 16 * 2**20
"""Inputs that go through the encoder at once in prediction."""

ENCODE_ROWS = 4096
"""Rows that go through the encoder at once in prediction."""


def _check_finite(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        return
    if all(bool(block.isfinite().all()) for block in tensor.split(65_536)):  # in blocks, for the memory
        return
    bad = ~tensor.isfinite()
    if bool(bad.any()):
        rows = bad.reshape(len(bad), -1).any(1)
        first = int(rows.nonzero()[0])
        raise ValueError(
            f"{name} holds NaN or infinite values in {int(rows.sum())} of {len(rows)} rows, the first in row {first}; "
            f"expected finite "
            "numbers. Remove or fill them."
        )


class EnergyRegressionModel(nn.Module):
    r"""An energy-based model of p(y|x), whole in one plain module.

    .. math:: p(y|x) = \frac{\exp f(x, y)}{Z(x)}, \qquad f(x, y) = \log p_0(y) + g(\mathrm{context}(x), y)

    Args:
        encoder: Any module that maps x to contexts (B, C).
        head: Module (context, v) to g; v are the target's unit coordinates in (-1, 1). See
            :mod:`energyreg.networks.heads`. None, with the proposal as base, for f = log q: the proposal as a model of
            its own.
        proposal: Module context to q(y|x), a torch distribution over model space. Needed for more than two target
            dimensions.
        base: Base measure p₀; the smooth marginal of the training targets by default. ``Lebesgue`` for none,
            ``ProposalBase`` for the proposal.
        space: Target space; one real number by default.
        detach_context: Whether the proposal's gradient stops before the encoder, as in paper IV. By default it does,
            unless the proposal is the base.

    Raises:
        ValueError: If the parts do not fit together.

    Source:
        Gustafsson et al., ECCV 2020, BMVC 2020, AISTATS 2022.

    >>> model = EnergyRegressionModel.for_table(num_features=3, width=16)
    >>> p = model(torch.randn(5, 3))
    >>> p.log_prob(torch.zeros(5)).shape, p.mean.shape, p.interval(0.9).shape, p.sample((10,)).shape
    (torch.Size([5]), torch.Size([5, 1]), torch.Size([5, 2]), torch.Size([10, 5, 1]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module | None,
        *,
        proposal: nn.Module | None = None,
        base: Lebesgue | Marginal | ProposalBase | None = None,
        space: TargetSpace | None = None,
        detach_context: bool | None = None,
    ) -> None:
        super().__init__()
        self.space = Real(1) if space is None else space
        if base is None:
            base = Marginal(self.space.dim, self.space.periodic)
        if base.dim != self.space.dim or tuple(base.periodic) != tuple(self.space.periodic):
            raise ValueError(
                f"base has {base.dim} dimension(s) with periodic={tuple(base.periodic)}, but the target space has "
                f"{self.space.dim} with "
                f"periodic={tuple(self.space.periodic)}; make the base with dim=space.dim and periodic=space.periodic."
            )
        for name, part in (("head", head), ("proposal", proposal)):
            dim, periodic = getattr(part, "dim", None), getattr(part, "periodic", None)
            if isinstance(dim, int) and dim != self.space.dim:
                raise ValueError(f"{name} is for {dim} target dimension(s), but the target space has {self.space.dim}.")
            if isinstance(dim, int) and tuple(periodic or (False,) * dim) != tuple(self.space.periodic):
                raise ValueError(
                    f"{name} has periodic={periodic}, but the target space {tuple(self.space.periodic)}; pass "
                    f"space.periodic."
                )
        if isinstance(base, ProposalBase) and proposal is None:
            raise ValueError("base is a ProposalBase, but proposal is None; pass the proposal that it stands for.")
        if head is None and not isinstance(base, ProposalBase):
            raise ValueError("head is None, which needs the proposal as base: pass base=ProposalBase(...), or a head.")
        if self.space.dim > 2 and proposal is None:
            raise ValueError(
                f"The target space has {self.space.dim} dimensions, where Z(x) needs importance sampling; pass a "
                f"proposal, e.g. "
                "energyreg.proposals.MixtureDensityNetwork."
            )
        self.encoder, self.head, self.proposal, self.base = encoder, head, proposal, base
        self.detach_context = detach_context

    @classmethod
    def for_table(
        cls,
        num_features: int,
        space: TargetSpace | None = None,
        *,
        width: int | None = None,
        depth: int = 2,
        dropout: float | None = None,
        num_components: int = 8,
        num_rows: int | None = None,
        cardinalities: Sequence[int] = (),
        frequency_scale: float | None = None,
    ) -> EnergyRegressionModel:
        """A model with the defaults for tables of numbers.

        Up to two target dimensions: separable head on the marginal of the targets, trained by exact maximum likelihood;
        with few rows on a mixture density network, which the model starts as and departs from where the data say so.
        More: joint head on a mixture density network as base and proposal, trained by NCE and the mixture's likelihood.

        Args:
            num_features: Columns of x.
            space: Target space; one real number by default.
            num_rows: Training rows, if known: fewer than 10,000 are few, fewer than 500 very few.
            width: Width of the encoder; by default 256, and 64 for a single feature with few rows.
            depth: Its hidden layers.
            dropout: Dropout probability after each of them; by default 0.2, and none for a single feature.
            num_components: Gaussians of the mixture, where there is one.
            cardinalities: How many categories the last columns of x have, for those that hold categories as whole
                numbers from 0 on (see :class:`~energyreg.networks.encoders.MixedTableEncoder`); by default all are
                numbers.
            frequency_scale: How fast the encoder's periodic features vary (see
                :class:`~energyreg.networks.encoders.TableEncoder`); by default 0.5, and 0.2 for a single feature or
                very few rows.
        """
        space = Real(1) if space is None else space
        width = table_width(num_features, num_rows) if width is None else width
        encoder = table_encoder(num_features, width, depth, dropout, cardinalities, num_rows, frequency_scale)
        dim, periodic = space.dim, space.periodic
        head = SeparableHead(width, dim, periodic) if dim <= 2 else JointHead(width, dim, periodic)
        if dim <= 2 and (num_rows is None or num_rows >= FEW_ROWS):
            return cls(encoder, head, space=space)
        proposal = MixtureDensityNetwork(width, dim, num_components, periodic=periodic)
        return cls(encoder, head, proposal=proposal, base=ProposalBase(Marginal(dim, periodic)), space=space)

    @classmethod
    def mixture_for_table(
        cls,
        num_features: int,
        space: TargetSpace | None = None,
        *,
        num_components: int = 8,
        width: int | None = None,
        depth: int = 2,
        dropout: float | None = None,
        num_rows: int | None = None,
        cardinalities: Sequence[int] = (),
        frequency_scale: float | None = None,
    ) -> EnergyRegressionModel:
        """A mixture density network with the same encoder, as a baseline; with one component a Gaussian network.

        Args:
            num_features: Columns of x.
            space: Target space; one real number by default.
            num_components: Gaussians K, in model space.
            width: Width of the encoder; by default 256, and 64 for a single feature with few rows.
            depth: Its hidden layers.
            dropout: Dropout probability after each of them; by default 0.2, and none for a single feature.
            num_rows: Training rows, if known; see `for_table`.
            cardinalities: How many categories the last columns of x have, for those that hold categories as whole
                numbers from 0 on (see :class:`~energyreg.networks.encoders.MixedTableEncoder`); by default all are
                numbers.
            frequency_scale: How fast the encoder's periodic features vary (see
                :class:`~energyreg.networks.encoders.TableEncoder`); by default 0.5, and 0.2 for a single feature or
                very few rows.
        """
        space = Real(1) if space is None else space
        width = table_width(num_features, num_rows) if width is None else width
        encoder = table_encoder(num_features, width, depth, dropout, cardinalities, num_rows, frequency_scale)
        proposal = MixtureDensityNetwork(width, space.dim, num_components, periodic=space.periodic)
        base = ProposalBase(Marginal(space.dim, space.periodic))
        return cls(encoder, None, proposal=proposal, base=base, space=space)

    def proposal_model(self) -> EnergyRegressionModel:
        """The proposal q(y|x) as a model of its own, which shares its parameters with this one.

        Raises:
            ValueError: If there is no proposal.
        """
        if self.proposal is None:
            raise ValueError("The model has no proposal.")
        base = self.base if isinstance(self.base, ProposalBase) else ProposalBase(self.base)
        model = EnergyRegressionModel(self.encoder, None, proposal=self.proposal, base=base, space=self.space)
        return model.train(self.training)

    # State -----------------------------------------------------------------------------------------------------------

    @property
    def _parameter(self) -> Tensor:
        for tensor in chain(self.parameters(), self.base.buffers()):
            if tensor.is_floating_point():
                return tensor
        raise AssertionError("a base has buffers")

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self._parameter.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._parameter.device

    @property
    def fitted(self) -> bool:
        """Whether the space, the base and the encoder have seen training data."""
        return all(bool(getattr(part, "fitted", True)) for part in (self.space, self.base, self.encoder))

    @property
    def preprocesses_inputs(self) -> bool:
        """Whether `fit_preprocessing` reads x: whether the encoder has something to fit."""
        return hasattr(self.encoder, "fit")

    def fit_preprocessing(self, x: Any, y: Any) -> None:
        """Fit what comes before training: the targets' standardisation, the base, the features' normaliser.

        Parts that are fitted already stay as they are.

        Args:
            x: Training inputs, or None where the encoder has nothing to fit.
            y: Training targets in user units, shape (N, D), or (N,) for D = 1.

        Raises:
            ValueError: If the targets are constant, fewer than two, not finite or outside the space.
        """
        y = self.check_targets(y)
        if not bool(self.space.fitted):
            self.space.fit(y)
        if not bool(self.base.fitted):
            self.base.fit(self.space.to_model(y.to(self.device)).to(self.dtype), window(self.space))
        fit_encoder = getattr(self.encoder, "fit", None)
        if x is not None and callable(fit_encoder) and not bool(getattr(self.encoder, "fitted", True)):
            fit_encoder(self.check_inputs(x).to(self.device))

    def check_inputs(self, x: Any) -> Tensor:
        """Inputs as a tensor of the model's dtype.

        Raises:
            ValueError: If x is empty, holds NaN or infinite values, or is no array of numbers.
        """
        x = as_array(x, "x")
        shape = self._input_shape
        if shape is not None and (
            x.ndim != 1 + len(shape) or any(n not in (None, m) for n, m in zip(shape, x.shape[1:], strict=True))
        ):
            sides = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"x has shape {tuple(x.shape)}, but the model takes (B, {sides}).")
        if x.ndim < 1 or len(x) == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected at least one row.")
        _check_finite(x, "x")
        return self._for_encoder(x)

    @property
    def _input_shape(self) -> tuple[int | None, ...] | None:
        """Shape of a row of x, as far as the encoder says it: of images by `input_shape`, of tables by columns."""
        shape = getattr(self.encoder, "input_shape", None)
        if isinstance(shape, tuple):
            return shape
        columns = getattr(self.encoder, "num_features", None)
        return (columns,) if isinstance(columns, int) else None

    def _for_encoder(self, x: Tensor) -> Tensor:
        """Inputs in the model's dtype; images of bytes stay such, a quarter of the memory, for their encoder."""
        images = isinstance(getattr(self.encoder, "input_shape", None), tuple)
        return x if images and x.dtype == torch.uint8 else x.to(self.dtype)

    def check_targets(self, y: Any) -> Tensor:
        """Targets as a tensor of shape (N, D), in the precision they came in.

        Raises:
            ValueError: If y is empty, has the wrong shape, holds NaN or infinite values, lies outside the space, or is
                no array of numbers.
        """
        y = as_array(y, "y")
        y = y if y.is_floating_point() else y.to(torch.double)
        dim = self.space.dim
        if dim == 1 and y.ndim == 1:
            y = y[:, None]
        if y.ndim != 2 or y.shape[1] != dim:
            short = " or (n,)" if dim == 1 else ""
            raise ValueError(
                f"y has shape {tuple(y.shape)}, but the target space has {dim} dimension(s); expected (n, "
                f"{dim}){short}."
            )
        if len(y) == 0:
            raise ValueError(f"y has shape {tuple(y.shape)}; expected at least one row.")
        self.space.check(y, "y")
        return y

    # Training --------------------------------------------------------------------------------------------------------

    def _q(self, context: Any) -> Distribution | None:
        if self.proposal is None:
            return None
        detach = self.detach_context
        if detach is None:  # an encoder of the proposal's own learns from nothing else
            detach = not isinstance(self.base, ProposalBase) and not isinstance(self.encoder, TwinEncoder)
        return self.proposal(context.detach() if detach else context)

    def energy_of_context(self, context: Tensor) -> EnergyFunction:
        """The energy function of rows whose contexts are known, shape (B, C)."""
        both = self.encoder.split(context) if isinstance(self.encoder, TwinEncoder) else (context, context)
        corrected = isinstance(self.base, ProposalBase) and self.base.standardised and self.base.detach
        if corrected and not isinstance(self.encoder, TwinEncoder):  # the proposal learns as it would by itself
            both = both[0].detach(), both[1]
        return EnergyFunction(self.head, both[0], self.base, self._q(both[1]))

    def energy(self, x: Any) -> EnergyFunction:
        """The energy function f(x, ·) of a batch, in model space; its ``q`` is the proposal."""
        return self.energy_of_context(self.encoder(self._for_encoder(x)))

    def condition(self, x: Tensor, y: Tensor) -> tuple[EnergyFunction, Distribution | None, Tensor]:
        """What an objective takes of one batch: ``objective(*model.condition(x, y))``.

        Args:
            x: Inputs, first dimension B.
            y: Targets in user units, shape (B, D), or (B,) for D = 1. Unchecked: this is the inner loop.

        Returns:
            The energy function, the proposal (or None), and the targets in model space, shape (B, D).
        """
        f = self.energy(x)
        z = self.space.to_model(y if y.ndim == 2 else y[:, None]).to(self.dtype)
        warn_if_unfitted(self.space, z)
        return f, f.q, z

    def default_objective(self) -> Any:
        """The objective that suits the model's parts.

        Without a head the proposal's likelihood; up to two target dimensions exact maximum likelihood by quadrature;
        for more, NCE with the proposal as noise, where the proposal learns by its likelihood if it is the base, else by
        J_KL.
        """
        if self.head is None:
            return objectives.ProposalNLL()
        if self.space.dim <= 2:
            return objectives.ExactMaximumLikelihood(num_nodes=256 if self.space.dim == 1 else 32**2)
        if isinstance(self.base, ProposalBase) and self.base.detach:
            return objectives.NCEWithLearnedProposal(kl_weight=0.0, nll_weight=1.0)
        return objectives.NCEWithLearnedProposal()

    # Prediction ------------------------------------------------------------------------------------------------------

    def default_integrator(self) -> Integrator:
        """How predictions are computed: adaptive quadrature for D = 1, importance sampling from the proposal for more.

        Two dimensions without a proposal use a grid.
        """
        if self.space.dim == 1:
            return AdaptiveQuadrature()
        if self.space.dim == 2 and self.proposal is None:
            return StratifiedQuadrature(num_nodes=128**2, jitter=False, graded=True)
        return ImportanceSampling(num_samples=4096)

    @as_usual
    def forward(
        self, x: Any, *, integrator: Integrator | None = None, seed: int = 0, memory_budget: int = 256 * 2**20
    ) -> PredictiveDistribution:
        """Return the predictive distribution p(y|x), in user units.

        In evaluation mode nothing carries a gradient; in training mode `log_prob` does.

        Args:
            x: Inputs, B rows: a tensor, an array or a data frame.
            integrator: How it is computed; by the number of target dimensions by default.
            seed: Of the points, where they are random.
            memory_budget: Working memory in bytes.

        Raises:
            ValueError: If x is empty, of the wrong shape, not finite, or no array of numbers.
        """
        x = self.check_inputs(x)
        return PredictiveDistribution(
            self._contexts(x, memory_budget), len(x), self.space,
            self.default_integrator() if integrator is None else integrator,
            differentiable=self.training, dtype=self.dtype, device=self.device, seed=seed, memory_budget=memory_budget,
        )  # fmt: skip

    def _contexts(self, x: Tensor, memory_budget: int) -> Any:
        """Rows to their energy function; the encoder runs once per row where the contexts may be kept."""
        if self.training and torch.is_grad_enabled():
            context = self.encoder(x.to(self.device))
            return partial(self._of_kept, context)
        row_bytes = max(x[0].numel() * x.element_size(), 1)
        step = max(min(ENCODE_ROWS, ENCODE_BYTES // row_bytes), 1)

        first = self._encode(x[:step], step)
        if len(x) * first[0].numel() * first.element_size() <= KEPT_FRACTION * memory_budget:
            kept = torch.cat([first, self._encode(x[step:], step)]) if len(x) > step else first
            return partial(self._of_kept, kept)

        return partial(self._of_encoded, x, step)

    # Bound methods in the place of closures: a prediction can be pickled.
    def _encode(self, x: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.encoder(block.to(self.device)) for block in x.split(step)])

    def _of_kept(self, context: Tensor, rows: Rows) -> EnergyFunction:
        return self.energy_of_context(context[rows])

    def _of_encoded(self, x: Tensor, step: int, rows: Rows) -> EnergyFunction:
        return self.energy_of_context(self._encode(x[rows], step))
