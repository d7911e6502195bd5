"""The members of an estimator's ensemble: how large they are, how they are built, and how they are trained."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from energyreg.densities.bases import Marginal, ProposalBase
from energyreg.densities.spaces import TargetSpace
from energyreg.estimators.settings import Settings, find_device
from energyreg.inference.integrators import ImportanceSampling
from energyreg.models.chain import EnergyChain
from energyreg.models.ensemble import EnergyEnsemble
from energyreg.models.model import EnergyRegressionModel
from energyreg.randomness import RandomSource
from energyreg.training.chains import fit_chain
from energyreg.training.ensembles import fit_ensemble
from energyreg.training.fitting import fit
from energyreg.training.history import History

__all__ = ["Builder", "Trial", "integrator_of", "sizes", "train_members", "weights_of"]

STEPS = 1_000
"""Training steps that are worth taking, however few the rows."""
EPOCHS = (20, 150)
"""Fewest and most passes over the rows by default."""
MORE_DROPOUT = 20_000
"""Rows from which on the dropout without pilots is that of the model's default."""
WIDTHS = ((20_000, 128), (math.inf, 256))
"""Training rows below which the encoder has this width by default."""
MEMBERS = ((20_000, 8), (math.inf, 6))
"""Training rows below which the ensemble has so many members by default."""
MEMBERS_OF_SEVERAL = ((5_000, 5), (50_000, 3), (math.inf, 2))
"""The same for several outputs."""
CHAINED_FROM = 3
"""Outputs from which on they are a chain by default."""
SAMPLES = 1024
"""Points per row of a density of several outputs that has a proposal."""

Model = EnergyRegressionModel | EnergyEnsemble | EnergyChain
Data = tuple[Tensor, Tensor]
Build = Callable[[], Any]


@dataclass(frozen=True)
class Trial:
    """What the members may differ in; None for the model's default."""

    frequency_scale: float | None
    dropout: float | None


@dataclass(frozen=True)
class Builder:
    """Builds members, with weights of their own.

    Attributes:
        settings: Parameters of the estimator.
        space: Target space, copied for each member.
        num_features: Inputs.
        rows: Training rows, by which sizes are chosen.
        cardinalities: Numbers of the categories' codes.
        components: Uniform components of the marginal base, in model space.
        replace_encoder: Makes another encoder of the one for tables.
    """

    settings: Settings
    space: TargetSpace
    num_features: int
    rows: int
    cardinalities: Sequence[int]
    components: Sequence[tuple[float, float]] = ()
    replace_encoder: Callable[[Any], Any] | None = None

    @property
    def chained(self) -> bool:
        """Whether the outputs are modelled by the chain rule."""
        return self.space.dim >= {"auto": CHAINED_FROM, "joint": math.inf, "chain": 2}[self.settings.outputs]

    def usual(self) -> Trial:
        """What a member gets without pilots."""
        scale, dropout = self.settings.frequency_scale, self.settings.dropout
        if dropout is None and self.num_features > 1 and self.rows < MORE_DROPOUT:
            dropout = 0.1
        return Trial(None if scale == "auto" else float(scale), dropout)

    def each(self, trials: Sequence[Trial]) -> Build:
        """A function that builds one member a call, for one trial after the other, again and again."""
        endless = itertools.cycle(trials)
        return lambda: self.model(next(endless)).to(find_device(self.settings.device))

    def model(self, trial: Trial) -> EnergyRegressionModel | EnergyChain:
        """A member, untrained."""
        settings = self.settings
        # A mixture has no edges, so where there are point masses their uniform components are the better start.
        few = {"auto": None if self.components else self.rows, "marginal": None, "proposal": 0}[settings.base]
        sizes: dict[str, Any] = {
            "width": _by_rows(WIDTHS, self.rows) if settings.width == "auto" else int(settings.width),
            "depth": settings.depth, "dropout": trial.dropout, "num_components": settings.num_components,
            "num_rows": few, "cardinalities": self.cardinalities,
        }  # fmt: skip
        space = copy.deepcopy(self.space)
        if self.chained:
            chain = EnergyChain.for_table(self.num_features, space, **sizes)
            if self.replace_encoder is not None:
                for factor in chain.factors:
                    inner = factor.encoder
                    if hasattr(inner, "inputs"):  # it joins the inputs with the outputs before
                        inner.inputs = self.replace_encoder(inner.inputs)
                    else:
                        factor.encoder = self.replace_encoder(inner)
            return chain
        model = EnergyRegressionModel.for_table(
            self.num_features, space, frequency_scale=trial.frequency_scale, **sizes
        )
        if self.components:
            marginal = Marginal(1, slabs=self.components)
            model.base = type(model.base)(marginal) if isinstance(model.base, ProposalBase) else marginal
        if self.replace_encoder is not None:
            model.encoder = self.replace_encoder(model.encoder)
        return model


def sizes(settings: Settings, outputs: int, rows: int, batch_size: int) -> tuple[int, int]:
    """Members and epochs for so many training rows."""
    auto = _by_rows(MEMBERS if outputs == 1 else MEMBERS_OF_SEVERAL, rows)
    members = auto if settings.n_members == "auto" else int(settings.n_members)
    steps = max(rows // min(batch_size, rows), 1)
    epochs = min(max(round(STEPS / steps), EPOCHS[0]), EPOCHS[1]) if settings.epochs == "auto" else settings.epochs
    return members, int(epochs)


def train_members(
    build: Build, data: Data, members: int, epochs: int, options: dict[str, Any], chained: bool
) -> tuple[Model, list[History]]:
    """Train what `build` builds, which is called once for each member.

    Args:
        build: Makes an untrained member.
        data: Inputs and targets.
        members: How many.
        epochs: Passes over the rows.
        options: Further arguments of :func:`energyreg.fit`.
        chained: Whether `build` makes chains.

    Returns:
        The model, and the histories of its members.
    """
    if chained:
        chain = fit_chain(build, *data, n_members=members, epochs=epochs, **options)
        return chain, [history for factor in chain.histories for history in factor]
    if members > 1:
        ensemble = fit_ensemble(build, *data, n_members=members, epochs=epochs, **options)
        return ensemble, ensemble.histories
    with RandomSource(options["seed"]).everywhere():
        model = build()
    return model, [fit(model, *data, epochs=epochs, **options)]


def integrator_of(model: Model) -> ImportanceSampling | None:
    """The integrator of a model that draws points; None where its own default does not."""
    draws = not isinstance(model, EnergyChain) and isinstance(model.default_integrator(), ImportanceSampling)
    return ImportanceSampling(SAMPLES) if draws else None


def weights_of(model: Model) -> list[float]:
    """The weights of an ensemble's members."""
    return model.shares if isinstance(model, EnergyEnsemble) else [1.0]


def _by_rows(table: Sequence[tuple[float, int]], rows: int) -> int:
    """The value of the first entry whose bound is above the number of rows."""
    return next(value for below, value in table if rows < below)
