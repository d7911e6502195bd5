"""The methods: one encoder, one budget, the library's objectives.

All are trained by `energyreg.fit` with the weights of their best epoch on the validation rows, and all predict by a
`PredictiveDistribution`. Each has a :class:`~energyreg.encoders.VectorEncoder` of its own on the frozen features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Laplace, Normal

import energyreg as er
from energyreg import objectives
from energyreg.bases import Lebesgue, Marginal, ProposalBase
from energyreg.chain import AncestralSampling, ChainEncoder
from energyreg.encoders import TwinEncoder, VectorEncoder
from energyreg.heads import JointHead, SelfNormalisedHead, SeparableHead
from energyreg.noise import GaussianNoise
from energyreg.predictive import PredictiveDistribution
from energyreg.proposals import DistributionProposal, MixtureDensityNetwork
from energyreg.spaces import Real
from experiments.images.data import Task
from experiments.uci.data import Split

__all__ = ["METHODS", "Method", "Outcome"]

Array = NDArray[np.float64]
Predict = Callable[[Array], PredictiveDistribution]

WIDTH, DEPTH, DROPOUT = 256, 2, 0.2
"""The encoder."""
HEAD_WIDTH = 64
"""Hidden layers of the joint head, which is evaluated for every sample of every row."""
SAMPLES = 32
"""Samples M of a row in the methods that sample; the papers take 1,024 on a GPU."""
COMPONENTS = (2, 4, 8, 20)
"""Gaussians that the mixture tries."""
PAPER_COMPONENTS = 4
"""Gaussians of the learned proposals and of the taught mixture, as in paper IV."""
BASE_COMPONENTS = 8
"""Gaussians that our energy starts from, as the estimator's, and of an ensemble's mixtures."""
MEMBERS = 4
"""Models of an ensemble."""
CHAIN_SAMPLES = 128
"""Draws by which a chain's means and intervals are computed."""
WINDOW = {1: 0.5, 3: 2.0}
"""How far an energy without a base is defined beyond the training targets, relative to their range, by the number of
targets."""
STRIDE = 1_000
"""Distance of the seeds of two ensembles, so that they share no member."""


@dataclass(frozen=True)
class Outcome:
    """A method trained on one fold.

    Attributes:
        predict: Maps rows to distributions.
        seconds: Time of the training, with all settings that were tried.
        setting: What was chosen on the validation rows.
        validation_nll: Its NLL there.
        variants: What else was trained on the way, by name; its NLL is reported.
        start: Maps rows to the direct estimates that predictions are refined from, where papers I and II do so.
    """

    predict: Predict
    seconds: float
    setting: dict[str, Any]
    validation_nll: float
    variants: dict[str, Predict] = field(default_factory=dict)
    start: Callable[[Array], Tensor] | None = None


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        name: Its name in the results.
        title: What it is.
        fit: Trains it on the rows of a task with a seed.
        dims: Numbers of targets that it is for.
    """

    name: str
    title: str
    fit: Callable[[Task, Split, int], Outcome]
    dims: tuple[int, ...] = (1, 3)


# ---------------------------------------------------------------------------------------------- models


def _encoder(split: Split, columns: int | None = None, depth: int = DEPTH) -> VectorEncoder:
    return VectorEncoder(split.x.shape[1] if columns is None else columns, WIDTH, depth, DROPOUT)


def _model(
    split: Split, head: nn.Module | None, proposal: nn.Module | None, base: nn.Module, encoder: nn.Module | None = None,
    kind: type[er.EnergyRegressionModel] = er.EnergyRegressionModel,
) -> er.EnergyRegressionModel:  # fmt: skip
    encoder = _encoder(split) if encoder is None else encoder
    return kind(encoder, head, proposal=proposal, base=base, space=Real(split.y.shape[1]))  # type: ignore[arg-type]


class _FixedScale(nn.Module):
    """A distribution whose location is learned and whose scale is not: its likelihood is direct regression.

    Args:
        dim: Targets D.
        family: `Normal` for squared errors, `Laplace` for absolute ones.
    """

    scale: Tensor

    def __init__(self, dim: int, family: type[Normal | Laplace]) -> None:
        super().__init__()
        self.family, self.location = family, nn.Linear(WIDTH, dim)
        self.register_buffer("scale", torch.ones(dim))

    def forward(self, context: Tensor) -> Distribution:
        """Return the distribution for contexts (B, C)."""
        location = self.location(context)
        return Independent(self.family(location, self.scale.expand_as(location)), 1)

    @torch.no_grad()
    def fit_scale(self, context: Tensor, z: Tensor) -> None:
        """Set the scale by maximum likelihood on held-out targets z in model space, (B, D)."""
        residual = z - self.location(context)
        squared = self.family is Normal
        self.scale.copy_(residual.square().mean(0).sqrt() if squared else residual.abs().mean(0))


class _Taught(er.EnergyRegressionModel):
    """A mixture with an energy as its teacher: what is judged, on the validation rows too, is the mixture."""

    def forward(self, x: Any, **settings: Any) -> PredictiveDistribution:
        """Return the mixture's distribution."""
        return self.proposal_model()(x, **settings)


def _window(dim: int) -> Lebesgue:
    """The papers' energies have no base; they are defined on a window."""
    return Lebesgue(dim, margin=WINDOW[dim])


def _reach(dim: int) -> Lebesgue | Marginal:
    """The same where J_KL teaches the proposal; for several targets the marginal, which is defined everywhere.

    Early in the training all samples of a row may lie outside a window, where J_KL is not a number: with
    three targets that happened in the first epoch.
    """
    return _window(dim) if dim == 1 else Marginal(dim)


def _mixture(split: Split, components: int) -> er.EnergyRegressionModel:
    dim = split.y.shape[1]
    return _model(split, None, MixtureDensityNetwork(WIDTH, dim, components), ProposalBase(Marginal(dim)))


def _joint(split: Split) -> JointHead:
    return JointHead(WIDTH, split.y.shape[1], width=HEAD_WIDTH)


def _ours(split: Split, components: int = BASE_COMPONENTS) -> er.EnergyRegressionModel:
    """What the estimator takes for one target and few rows: a separable head on a mixture that trains along."""
    return _model(split, SeparableHead(WIDTH), MixtureDensityNetwork(WIDTH, 1, components), ProposalBase(Marginal(1)))


def _chain(split: Split, components: int = BASE_COMPONENTS) -> er.EnergyChain:
    """The same for several targets: a factor for each, which sees the features and the targets before it."""
    factors = []
    for previous in range(split.y.shape[1]):
        encoder: nn.Module = _encoder(split)
        if previous:
            inputs = _encoder(split, depth=DEPTH - 1)
            encoder = ChainEncoder(_encoder(split, previous, DEPTH - 1), inputs, WIDTH, DROPOUT)
        proposal = MixtureDensityNetwork(WIDTH, 1, components)
        factors.append(
            er.EnergyRegressionModel(
                encoder, SeparableHead(WIDTH), proposal=proposal, base=ProposalBase(Marginal(1)), space=Real(1)
            )
        )
    return er.EnergyChain(factors)


# ---------------------------------------------------------------------------------------------- training


def _budget(task: Task, split: Split) -> dict[str, Any]:
    return {
        "validation": (split.x_validation, split.y_validation), "epochs": task.epochs,
        "batch_size": min(task.batch, len(split.y)), "progress": False,
    }  # fmt: skip


def _train(
    task: Task, split: Split, seed: int, build: Callable[[], er.EnergyRegressionModel],
    objective: Callable[[er.EnergyRegressionModel], Any] | None = None,
) -> tuple[er.EnergyRegressionModel, float]:  # fmt: skip
    """A trained model, and its NLL on the validation rows.

    Args:
        task, split, seed: As in :class:`Method`.
        build: Makes the untrained model.
        objective: Makes what to minimise from the model, whose units are known by then; None for its default.
    """
    torch.manual_seed(seed)
    model = build()
    model.fit_preprocessing(split.x, split.y)
    minimised = None if objective is None else objective(model)
    history = er.fit(model, split.x, split.y, objective=minimised, seed=seed, **_budget(task, split))
    assert history.best_validation_nll is not None
    return model, history.best_validation_nll


def _single(
    build: Callable[[Split], er.EnergyRegressionModel], objective: Any = None
) -> Callable[[Task, Split, int], Outcome]:
    def fit(task: Task, split: Split, seed: int) -> Outcome:
        started = time.perf_counter()
        made = None if objective is None else lambda _: objective
        model, nll = _train(task, split, seed, lambda: build(split), made)
        return Outcome(model, time.perf_counter() - started, {}, nll)

    return fit


def _direct(family: type[Normal | Laplace]) -> Callable[[Task, Split, int], Outcome]:
    def fit(task: Task, split: Split, seed: int) -> Outcome:
        started = time.perf_counter()
        dim = split.y.shape[1]

        def build() -> er.EnergyRegressionModel:
            return _model(split, None, DistributionProposal(_FixedScale(dim, family), dim), ProposalBase(Marginal(dim)))

        model, _ = _train(task, split, seed, build)
        scaled: Any = model.proposal.module  # type: ignore[union-attr]
        x, y = model.check_inputs(split.x_validation), model.check_targets(split.y_validation)
        with torch.no_grad():
            scaled.fit_scale(model.encoder(x), model.space.to_model(y).to(model.dtype))
        nll = -float(model(x).log_prob(y).double().mean())
        return Outcome(model, time.perf_counter() - started, {}, nll)

    return fit


def _by_hand(task: Task, split: Split, seed: int) -> Outcome:
    """NCE with the paper's noise around the target; for several targets a mixture learns along, to find Z with."""
    dim = split.y.shape[1]

    def build() -> er.EnergyRegressionModel:
        proposal = MixtureDensityNetwork(WIDTH, dim, PAPER_COMPONENTS) if dim > 1 else None
        return _model(split, _joint(split), proposal, _window(dim))

    def objective(model: er.EnergyRegressionModel) -> objectives.NCE:
        scale = torch.as_tensor(model.space.scale).double().reshape(-1)
        return objectives.NCE(GaussianNoise([(width / scale).tolist() for width in task.noise]), SAMPLES)

    started = time.perf_counter()
    model, nll = _train(task, split, seed, build, objective)
    seconds = time.perf_counter() - started
    direct = _direct(Normal)(task, split, seed)
    return Outcome(model, seconds, {}, nll, start=lambda x: direct.predict(x).mean)


def _learned(split: Split) -> er.EnergyRegressionModel:
    dim = split.y.shape[1]
    return _model(split, _joint(split), MixtureDensityNetwork(WIDTH, dim, PAPER_COMPONENTS), _reach(dim))


def _learn_proposal(task: Task, split: Split, seed: int) -> Outcome:
    """The joint objective J. For several targets the proposal's likelihood comes first, for one epoch, as in the code
    of paper IV: a proposal that has not seen the targets may have no sample where the energy is defined."""

    def objective(model: er.EnergyRegressionModel) -> Any:
        if split.y.shape[1] > 1:
            first = {**_budget(task, split), "epochs": 1, "schedule": "constant"}
            er.fit(model, split.x, split.y, objective=objectives.ProposalNLL(), seed=seed, **first)
        return objectives.MaximumLikelihoodWithLearnedProposal(SAMPLES)

    started = time.perf_counter()
    model, nll = _train(task, split, seed, lambda: _learned(split), objective)
    return Outcome(model, time.perf_counter() - started, {}, nll)


def _self_normalised(split: Split) -> er.EnergyRegressionModel:
    dim = split.y.shape[1]
    head = SelfNormalisedHead(_joint(split), WIDTH)
    return _model(split, head, MixtureDensityNetwork(WIDTH, dim, PAPER_COMPONENTS), _window(dim))


def _taught(split: Split) -> er.EnergyRegressionModel:
    dim = split.y.shape[1]
    proposal, twins = MixtureDensityNetwork(WIDTH, dim, PAPER_COMPONENTS), (_encoder(split), _encoder(split))
    return _model(split, _joint(split), proposal, _reach(dim), TwinEncoder(*twins), _Taught)


def _on_proposal(split: Split) -> er.EnergyRegressionModel:
    """The library's joint model for several targets: an energy on the mixture that trains along."""
    dim = split.y.shape[1]
    proposal = MixtureDensityNetwork(WIDTH, dim, BASE_COMPONENTS)
    return _model(split, _joint(split), proposal, ProposalBase(Marginal(dim)))


def _tuned_mixture(task: Task, split: Split, seed: int) -> Outcome:
    started = time.perf_counter()
    trained = {}
    for components in COMPONENTS:
        trained[components] = _train(task, split, seed, lambda k=components: _mixture(split, k))  # type: ignore[misc]
    best = min(trained, key=lambda k: trained[k][1])
    variants: dict[str, Predict] = {str(k): model for k, (model, _) in trained.items()}
    model, nll = trained[best]
    return Outcome(model, time.perf_counter() - started, {"components": best}, nll, variants)


def _chained(members: int, components: int = BASE_COMPONENTS) -> Callable[[Task, Split, int], Outcome]:
    def fit(task: Task, split: Split, seed: int) -> Outcome:
        started = time.perf_counter()
        torch.manual_seed(seed)
        first = seed if members == 1 else STRIDE * (seed + 1)
        chain = er.fit_chain(
            lambda: _chain(split, components), split.x, split.y, n_members=members, seed=first, **_budget(task, split)
        )
        seconds = time.perf_counter() - started

        def predict(x: Array) -> PredictiveDistribution:
            return chain(x, integrator=AncestralSampling(CHAIN_SAMPLES))

        nll = -float(predict(split.x_validation).log_prob(split.y_validation).double().mean())
        return Outcome(predict, seconds, {}, nll)

    return fit


def _ensemble(build: Callable[[Split], er.EnergyRegressionModel]) -> Callable[[Task, Split, int], Outcome]:
    def fit(task: Task, split: Split, seed: int) -> Outcome:
        started = time.perf_counter()
        models = er.fit_ensemble(
            lambda: build(split), split.x, split.y, n_members=MEMBERS, seed=STRIDE * (seed + 1), **_budget(task, split)
        )
        seconds = time.perf_counter() - started
        nll = -float(models(split.x_validation).log_prob(split.y_validation).double().mean())
        return Outcome(models, seconds, {}, nll)

    return fit


def _by_targets(
    one: Callable[[Task, Split, int], Outcome], several: Callable[[Task, Split, int], Outcome]
) -> Callable[[Task, Split, int], Outcome]:
    return lambda task, split, seed: (one if split.y.shape[1] == 1 else several)(task, split, seed)


def _marginal(split: Split) -> er.EnergyRegressionModel:
    return _model(split, SeparableHead(WIDTH), None, Marginal(1))


METHODS: Sequence[Method] = [
    Method("direct-l2", "direct regression, squared error", _direct(Normal)),
    Method("direct-l1", "direct regression, absolute error", _direct(Laplace)),
    Method("gaussian", "Gaussian network", _single(lambda split: _mixture(split, 1))),
    Method("mixture", "mixture density network, K by validation", _tuned_mixture),
    Method("ours", "our default", _by_targets(_single(_ours), _chained(1))),
    Method("ours-gaussian", "the same on a Gaussian instead of a mixture of eight", _by_targets(
        _single(lambda split: _ours(split, 1)), _chained(1, 1))),
    Method("ours-marginal", "separable head on the marginal", _single(_marginal), (1,)),
    Method("ours-joint", "joint head on a mixture, NCE", _single(
        _on_proposal, objectives.NCEWithLearnedProposal(SAMPLES, kl_weight=0.0, nll_weight=1.0)), (3,)),
    Method("nce", "energy, noise by hand (papers I, II, IV)", _by_hand),
    Method("learned", "energy with learned proposal (paper IV)", _learn_proposal),
    Method("teacher", "mixture with an energy as teacher (paper IV)", _single(
        _taught, objectives.NCEWithLearnedProposal(SAMPLES, kl_weight=0.5, nll_weight=0.5))),
    Method("snl", "self-normalised likelihood", _single(
        _self_normalised, objectives.SelfNormalisedLikelihood(SAMPLES))),
    Method("mixture-ensemble", "four mixtures", _ensemble(lambda split: _mixture(split, BASE_COMPONENTS))),
    Method("ours-ensemble", "four of our default", _by_targets(_ensemble(_ours), _chained(MEMBERS))),
]  # fmt: skip
"""In the order of work."""
