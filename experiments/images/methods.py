"""The methods: one encoder, one budget, the library's objectives.

All are trained by `energyreg.fit` with the weights of their best epoch on the validation rows, and all predict by a
`PredictiveDistribution`. Each has a :class:`~energyreg.networks.encoders.VectorEncoder` of its own on the frozen
features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Laplace, Normal

import energyreg as er
from energyreg import objectives
from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase
from energyreg.densities.mixtures import GaussianMixture
from energyreg.densities.noise import GaussianNoise
from energyreg.densities.spaces import Real
from energyreg.models.calibration import Calibration
from energyreg.models.chain import AncestralSampling, ChainEncoder
from energyreg.models.predictive import PredictiveDistribution
from energyreg.networks.encoders import TwinEncoder, VectorEncoder
from energyreg.networks.heads import JointHead, SelfNormalisedHead, SeparableHead
from energyreg.networks.proposals import DistributionProposal, MixtureDensityNetwork
from experiments.images.data import Rows, Task

__all__ = ["METHODS", "Method", "Outcome"]

Array = NDArray[np.float64]
Predict = Callable[[Array], PredictiveDistribution]

WIDTH, DEPTH = 256, 2
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
class Regularisation:
    """How a network is kept from learning its rows by heart.

    Attributes:
        name: Its name in the results.
        dropout: Dropout probability of the encoder.
        learning_rate: Largest learning rate.
    """

    name: str
    dropout: float
    learning_rate: float


LIGHT, STRONG = Regularisation("light", 0.2, 3e-3), Regularisation("strong", 0.5, 1e-3)
"""What the tuned methods choose from; all others are trained by the first."""


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
        tasks: Names of the tasks that it is for; all without.
    """

    name: str
    title: str
    fit: Callable[[Task, Rows, int], Outcome]
    dims: tuple[int, ...] = (1, 3)
    tasks: tuple[str, ...] | None = None

    def suits(self, task: Task) -> bool:
        """Whether it is for a task."""
        return len(task.targets) in self.dims and (self.tasks is None or task.name in self.tasks)


# ---------------------------------------------------------------------------------------------- models


def _encoder(
    split: Rows, columns: int | None = None, depth: int = DEPTH, dropout: float = LIGHT.dropout
) -> VectorEncoder:
    return VectorEncoder(split.x.shape[1] if columns is None else columns, WIDTH, depth, dropout)


def _model(
    split: Rows, head: nn.Module | None, proposal: nn.Module | None, base: nn.Module, encoder: nn.Module | None = None,
    kind: type[er.EnergyRegressionModel] = er.EnergyRegressionModel, dropout: float = LIGHT.dropout,
) -> er.EnergyRegressionModel:  # fmt: skip
    encoder = _encoder(split, dropout=dropout) if encoder is None else encoder
    return kind(encoder, head, proposal=proposal, base=base, space=Real(split.y.shape[1]))  # type: ignore[arg-type]


def _slabs(split: Rows) -> list[list[float]]:
    """Ends of the slabs in model space."""
    space = Real(1)
    space.fit(torch.as_tensor(split.y))
    return space.to_model(torch.tensor(split.slabs, dtype=torch.double).reshape(-1, 1)).reshape(-1, 2).tolist()


def _smooth(split: Rows) -> Marginal:
    """The marginal of the targets, with the slabs of a task that has any."""
    return Marginal(1, slabs=_slabs(split)) if split.slabs else Marginal(1)


class _SlabMixture(Distribution):
    """A mixture of Gaussians and of uniform slabs, with weights that depend on x.

    Args:
        gaussians: The Gaussians.
        log_weights: Of all of them together and of each slab, shape (B, 1 + S).
        ends: Ends of the slabs, shape (S, 2).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)

    def __init__(self, gaussians: GaussianMixture, log_weights: Tensor, ends: Tensor) -> None:
        self.gaussians, self.log_weights, self.ends = gaussians, log_weights, ends
        super().__init__(gaussians.batch_shape, gaussians.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, (*S, B, 1) or (*S, 1, 1) to (*S, B)."""
        low, high = self.ends.unbind(-1)
        inside = (value >= low) & (value <= high)
        slabs = torch.where(inside, self.log_weights[:, 1:] - (high - low).log(), -torch.inf)
        smooth = self.gaussians.log_prob(value) + self.log_weights[:, 0]
        return torch.cat([smooth[..., None], slabs], -1).logsumexp(-1)


class _SlabMixtureNetwork(nn.Module):
    """Context to a mixture of K Gaussians and of the slabs of a task: a mixture that is told of the atoms."""

    ends: Tensor

    def __init__(self, split: Rows, components: int) -> None:
        super().__init__()
        self.gaussians = MixtureDensityNetwork(WIDTH, 1, components)
        self.weights = nn.Linear(WIDTH, 1 + len(split.slabs))
        self.register_buffer("ends", torch.tensor(_slabs(split)))

    def forward(self, context: Tensor) -> _SlabMixture:
        """Return q(y|x) for contexts (B, C)."""
        return _SlabMixture(self.gaussians(context), self.weights(context).log_softmax(-1), self.ends)


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


def _reach(split: Rows) -> Lebesgue | Marginal:
    """The same where J_KL teaches the proposal; for several targets and with atoms the marginal, defined everywhere.

    All samples of a row may lie outside a window, where J_KL is not a number: with three targets that happened in the
    first epoch, with steering in one seed of three.
    """
    dim = split.y.shape[1]
    return Marginal(dim) if dim > 1 or split.slabs else _window(dim)


def _mixture(split: Rows, components: int, dropout: float = LIGHT.dropout) -> er.EnergyRegressionModel:
    dim = split.y.shape[1]
    proposal = MixtureDensityNetwork(WIDTH, dim, components)
    return _model(split, None, proposal, ProposalBase(Marginal(dim)), dropout=dropout)


def _slab_proposal(split: Rows, components: int) -> DistributionProposal:
    return DistributionProposal(_SlabMixtureNetwork(split, components), 1)


def _slab_mixture(split: Rows, components: int, dropout: float) -> er.EnergyRegressionModel:
    return _model(split, None, _slab_proposal(split, components), ProposalBase(_smooth(split)), dropout=dropout)


def _joint(split: Rows) -> JointHead:
    return JointHead(WIDTH, split.y.shape[1], width=HEAD_WIDTH)


def _ours(split: Rows, components: int = BASE_COMPONENTS) -> er.EnergyRegressionModel:
    """What the estimator takes for one target and few rows: a separable head on a mixture that trains along."""
    return _model(split, SeparableHead(WIDTH), MixtureDensityNetwork(WIDTH, 1, components), ProposalBase(Marginal(1)))


def _on_marginal(split: Rows, dropout: float = LIGHT.dropout) -> er.EnergyRegressionModel:
    return _model(split, SeparableHead(WIDTH), None, _smooth(split), dropout=dropout)


def _on_mixture(split: Rows, dropout: float) -> er.EnergyRegressionModel:
    """A separable head on the mixture of eight; on one with slabs, where the task has atoms."""
    proposal = _slab_proposal(split, BASE_COMPONENTS) if split.slabs else MixtureDensityNetwork(WIDTH, 1)
    return _model(split, SeparableHead(WIDTH), proposal, ProposalBase(_smooth(split)), dropout=dropout)


def _on_gaussian(split: Rows, dropout: float) -> er.EnergyRegressionModel:
    """A separable head that sees the target standardised by a Gaussian network, which it corrects."""
    proposal = MixtureDensityNetwork(WIDTH, 1, 1)
    base = ProposalBase(_smooth(split), standardised=True)
    return _model(split, SeparableHead(WIDTH), proposal, base, dropout=dropout)


def _joint_on_gaussian(split: Rows, dropout: float) -> er.EnergyRegressionModel:
    """The same for several targets, with a joint head."""
    dim = split.y.shape[1]
    base = ProposalBase(Marginal(dim), standardised=True)
    return _model(split, _joint(split), MixtureDensityNetwork(WIDTH, dim, 1), base, dropout=dropout)


def _chain(split: Rows, components: int = BASE_COMPONENTS, dropout: float = LIGHT.dropout) -> er.EnergyChain:
    """A factor for each target, which sees the features and the targets before it."""
    factors = []
    for previous in range(split.y.shape[1]):
        encoder: nn.Module = _encoder(split, dropout=dropout)
        if previous:
            inputs = _encoder(split, depth=DEPTH - 1, dropout=dropout)
            encoder = ChainEncoder(_encoder(split, previous, DEPTH - 1, dropout), inputs, WIDTH, dropout)
        proposal = MixtureDensityNetwork(WIDTH, 1, components)
        base = ProposalBase(Marginal(1))
        factors.append(
            er.EnergyRegressionModel(encoder, SeparableHead(WIDTH), proposal=proposal, base=base, space=Real(1))
        )
    return er.EnergyChain(factors)


# ---------------------------------------------------------------------------------------------- training


def _budget(task: Task, split: Rows, how: Regularisation = LIGHT) -> dict[str, Any]:
    return {
        "validation": (split.x_validation, split.y_validation), "epochs": task.epochs,
        "batch_size": min(task.batch, len(split.y)), "learning_rate": how.learning_rate, "progress": False,
    }  # fmt: skip


def _train(
    task: Task, split: Rows, seed: int, build: Callable[[], er.EnergyRegressionModel],
    objective: Callable[[er.EnergyRegressionModel], Any] | None = None, how: Regularisation = LIGHT,
) -> tuple[er.EnergyRegressionModel, float]:  # fmt: skip
    """A trained model, and its NLL on the validation rows.

    Args:
        task, split, seed: As in :class:`Method`.
        build: Makes the untrained model.
        objective: Makes what to minimise from the model, whose units are known by then; None for its default.
        how: Learning rate; the dropout is the model's.
    """
    torch.manual_seed(seed)
    model = build()
    model.fit_preprocessing(split.x, split.y)
    minimised = None if objective is None else objective(model)
    history = er.fit(model, split.x, split.y, objective=minimised, seed=seed, **_budget(task, split, how))
    assert history.best_validation_nll is not None
    return model, history.best_validation_nll


def _single(
    build: Callable[[Rows], er.EnergyRegressionModel], objective: Any = None
) -> Callable[[Task, Rows, int], Outcome]:
    def fit(task: Task, split: Rows, seed: int) -> Outcome:
        started = time.perf_counter()
        made = None if objective is None else lambda _: objective
        model, nll = _train(task, split, seed, lambda: build(split), made)
        return Outcome(model, time.perf_counter() - started, {}, nll)

    return fit


def _direct(family: type[Normal | Laplace]) -> Callable[[Task, Rows, int], Outcome]:
    def candidate(task: Task, split: Rows, seed: int, how: Regularisation) -> tuple[Predict, float]:
        dim = split.y.shape[1]

        def build() -> er.EnergyRegressionModel:
            proposal = DistributionProposal(_FixedScale(dim, family), dim)
            return _model(split, None, proposal, ProposalBase(Marginal(dim)), dropout=how.dropout)

        model, _ = _train(task, split, seed, build, how=how)
        scaled: Any = model.proposal.module  # type: ignore[union-attr]
        x, y = model.check_inputs(split.x_validation), model.check_targets(split.y_validation)
        with torch.no_grad():
            scaled.fit_scale(model.encoder(x), model.space.to_model(y).to(model.dtype))
        return model, -float(model(x).log_prob(y).double().mean())

    return _tuned(lambda: {"direct": candidate}, calibrate=False)


Candidate = Callable[[Task, Rows, int, Regularisation], tuple[Predict, float]]
"""Trains on rows with a seed; returns what predicts, and its NLL on the validation rows."""


def _candidate(build: Callable[[Rows, float], er.EnergyRegressionModel], objective: Any = None) -> Candidate:
    def train(task: Task, split: Rows, seed: int, how: Regularisation) -> tuple[Predict, float]:
        made = None if objective is None else lambda _: objective
        return _train(task, split, seed, lambda: build(split, how.dropout), made, how)

    return train


def _tuned(
    candidates: Callable[[], Mapping[str, Candidate]], calibrate: bool = True
) -> Callable[[Task, Rows, int], Outcome]:
    """All candidates with either regularisation, the best one by its NLL on the validation rows.

    Args:
        candidates: Gives them by their names.
        calibrate: Whether the best one is judged a second time, with temperature and defensive share fitted to the
            validation rows.
    """

    def fit(task: Task, split: Rows, seed: int) -> Outcome:
        started = time.perf_counter()
        trained: dict[tuple[str, str], tuple[Predict, float]] = {}
        failed: er.TrainingError | None = None
        for name, candidate in candidates().items():
            for how in (LIGHT, STRONG):
                try:
                    trained[name, how.name] = candidate(task, split, seed, how)
                except er.TrainingError as error:  # one setting of many
                    failed = error
        known = {key: nll for key, (_, nll) in trained.items() if math.isfinite(nll)}
        if not known:
            raise failed or er.TrainingError("no setting has a finite likelihood of the validation rows")
        best = min(known, key=known.__getitem__)
        predict, nll = trained[best]
        variants = {name if how == LIGHT.name else f"{name}, {how}": p for (name, how), (p, _) in trained.items()}
        seconds = time.perf_counter() - started
        if calibrate:
            calibration = Calibration.fit(predict(split.x_validation), split.y_validation)
            variants["calibrated"] = lambda x: calibration(predict(x))
        return Outcome(predict, seconds, {"chosen": best[0], "regularisation": best[1]}, nll, variants)

    return fit


def _by_hand(task: Task, split: Rows, seed: int) -> Outcome:
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


def _learned(split: Rows) -> er.EnergyRegressionModel:
    dim = split.y.shape[1]
    return _model(split, _joint(split), MixtureDensityNetwork(WIDTH, dim, PAPER_COMPONENTS), _reach(split))


def _learn_proposal(task: Task, split: Rows, seed: int) -> Outcome:
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


def _self_normalised(split: Rows) -> er.EnergyRegressionModel:
    dim = split.y.shape[1]
    head = SelfNormalisedHead(_joint(split), WIDTH)
    return _model(split, head, MixtureDensityNetwork(WIDTH, dim, PAPER_COMPONENTS), _window(dim))


def _taught(split: Rows) -> er.EnergyRegressionModel:
    dim = split.y.shape[1]
    proposal, twins = MixtureDensityNetwork(WIDTH, dim, PAPER_COMPONENTS), (_encoder(split), _encoder(split))
    return _model(split, _joint(split), proposal, _reach(split), TwinEncoder(*twins), _Taught)


def _on_proposal(split: Rows, dropout: float = LIGHT.dropout) -> er.EnergyRegressionModel:
    """The library's joint model for several targets: an energy on the mixture that trains along."""
    dim = split.y.shape[1]
    proposal = MixtureDensityNetwork(WIDTH, dim, BASE_COMPONENTS)
    return _model(split, _joint(split), proposal, ProposalBase(Marginal(dim)), dropout=dropout)


def _mixtures(
    build: Callable[[Rows, int, float], er.EnergyRegressionModel], components: Sequence[int] | None = None
) -> Mapping[str, Candidate]:
    """One of each number of Gaussians."""

    def one(k: int) -> Candidate:
        return _candidate(lambda split, dropout: build(split, k, dropout))

    return {str(k): one(k) for k in (COMPONENTS if components is None else components)}


def _chain_candidate(components: int = BASE_COMPONENTS, members: int = 1) -> Candidate:
    def train(task: Task, split: Rows, seed: int, how: Regularisation) -> tuple[Predict, float]:
        torch.manual_seed(seed)
        first = seed if members == 1 else STRIDE * (seed + 1)
        chain = er.fit_chain(
            lambda: _chain(split, components, how.dropout), split.x, split.y, n_members=members,
            seed=first, **_budget(task, split, how),
        )  # fmt: skip

        def predict(x: Array) -> PredictiveDistribution:
            return chain(x, integrator=AncestralSampling(CHAIN_SAMPLES))

        return predict, -float(predict(split.x_validation).log_prob(split.y_validation).double().mean())

    return train


def _chained(members: int, components: int = BASE_COMPONENTS) -> Callable[[Task, Rows, int], Outcome]:
    def fit(task: Task, split: Rows, seed: int) -> Outcome:
        started = time.perf_counter()
        predict, nll = _chain_candidate(components, members=members)(task, split, seed, LIGHT)
        return Outcome(predict, time.perf_counter() - started, {}, nll)

    return fit


def _ensemble(build: Callable[[Rows], er.EnergyRegressionModel]) -> Callable[[Task, Rows, int], Outcome]:
    def fit(task: Task, split: Rows, seed: int) -> Outcome:
        started = time.perf_counter()
        models = er.fit_ensemble(
            lambda: build(split), split.x, split.y, n_members=MEMBERS, seed=STRIDE * (seed + 1), **_budget(task, split)
        )
        seconds = time.perf_counter() - started
        nll = -float(models(split.x_validation).log_prob(split.y_validation).double().mean())
        return Outcome(models, seconds, {}, nll)

    return fit


def _by_targets(
    one: Callable[[Task, Rows, int], Outcome], several: Callable[[Task, Rows, int], Outcome]
) -> Callable[[Task, Rows, int], Outcome]:
    return lambda task, split, seed: (one if split.y.shape[1] == 1 else several)(task, split, seed)


NOISE_IS_PROPOSAL = objectives.NCEWithLearnedProposal(SAMPLES, kl_weight=0.0, nll_weight=1.0)
"""NCE with the proposal as noise, which learns by its own likelihood: the library's objective for several targets."""
FEW_ROWS = 500
"""Training rows below which a Gaussian that is corrected is tried; its head takes several times as long."""
ONE_TARGET: Mapping[str, Candidate] = {
    "on the marginal": _candidate(_on_marginal), "on a mixture": _candidate(_on_mixture),
}  # fmt: skip
CORRECTED: Mapping[str, Candidate] = {"on a Gaussian": _candidate(_on_gaussian)}
SEVERAL_TARGETS: Mapping[str, Candidate] = {
    "chain on mixtures": _chain_candidate(), "joint on a mixture": _candidate(_on_proposal, NOISE_IS_PROPOSAL),
    "joint on a Gaussian": _candidate(_joint_on_gaussian, NOISE_IS_PROPOSAL),
}  # fmt: skip


def _ours_tuned(task: Task, split: Rows, seed: int) -> Outcome:
    several, few = split.y.shape[1] > 1, len(split.y) < FEW_ROWS
    candidates = SEVERAL_TARGETS if several else {**ONE_TARGET, **CORRECTED} if few else ONE_TARGET
    return _tuned(lambda: candidates)(task, split, seed)


METHODS: Sequence[Method] = [
    Method("direct-l2", "direct regression, squared error", _direct(Normal)),
    Method("direct-l1", "direct regression, absolute error", _direct(Laplace)),
    Method("gaussian", "Gaussian network", _tuned(lambda: _mixtures(_mixture, (1,)))),
    Method("mixture", "mixture density network, K by validation", _tuned(lambda: _mixtures(_mixture))),
    Method("mixture-atoms", "the same with a slab for each atom", _tuned(lambda: _mixtures(_slab_mixture)), (1,),
           ("steering",)),
    Method("ours-tuned", "ours, its base by validation", _ours_tuned),
    Method("ours", "our default", _by_targets(_single(_ours), _chained(1))),
    Method("ours-gaussian", "the same on a Gaussian instead of a mixture of eight", _by_targets(
        _single(lambda split: _ours(split, 1)), _chained(1, 1))),
    Method("ours-marginal", "separable head on the marginal", _single(_on_marginal), (1,)),
    Method("ours-joint", "joint head on a mixture, NCE", _single(
        _on_proposal, NOISE_IS_PROPOSAL), (3,)),
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
