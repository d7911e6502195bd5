"""Training of chains: the factors are problems of their own, and each is trained by `fit` or `fit_ensemble`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from energyreg.checks import check_count
from energyreg.models.chain import EnergyChain
from energyreg.models.ensemble import EnergyEnsemble
from energyreg.models.model import EnergyRegressionModel
from energyreg.modes import with_gradients
from energyreg.training.data import checked_weights, split
from energyreg.training.ensembles import built, fit_ensemble, time_left
from energyreg.training.fitting import fit
from energyreg.training.history import History
from energyreg.training.settings import TrainingSettings

__all__ = ["fit_chain"]


@with_gradients
def fit_chain(
    build: Callable[[], EnergyChain],
    x: Any,
    y: Any,
    *,
    n_members: int = 1,
    sample_weight: Any = None,
    validation: Any = "auto",
    time_limit: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> EnergyChain:
    """Train a chain on arrays, one factor after the other.

    Each factor is trained on the previous targets as they were observed, by exact maximum likelihood, and keeps the
    weights of its own best epoch: the sum of their losses is the joint one, so nothing is lost by that. All factors
    share the rows held out.

    Args:
        build: Makes an untrained chain, called without arguments.
        x: Inputs with N rows, as in :func:`energyreg.fit`; a table of numbers.
        y: Targets in user units, shape (N, D).
        n_members: Models of each factor, which become an ensemble: the factor is the mean of their densities.
        sample_weight: As in `fit`.
        validation: As in `fit`, but for a DataLoader.
        time_limit: As in `fit`: seconds for all factors together, of which each that is left gets an equal share.
        seed: Seed of all randomness.
        **settings: What else :func:`energyreg.fit` takes, such as epochs and learning_rate, but for `checkpoint_dir`
            and `resume`.

    Returns:
        The chain, in evaluation mode, with the histories of each factor's members as its `histories`.

    Raises:
        ValueError: If data or arguments cannot be used.
        TrainingError: If a training diverges.

    >>> from energyreg.densities.spaces import Real
    >>> x = torch.rand(200, 2)
    >>> y = x + 0.1 * torch.randn(200, 1)
    >>> def build():
    ...     return EnergyChain.for_table(num_features=2, space=Real(2), width=16)
    >>> chain = fit_chain(build, x, y, epochs=2)
    >>> chain(x).log_prob(y).shape
    torch.Size([200])
    """
    started = time.perf_counter()
    check_count("n_members", n_members)
    if refused := sorted({"checkpoint_dir", "resume"} & set(settings)):
        raise ValueError(f"{refused[0]} is given, but a chain's training cannot be resumed; leave it out.")
    TrainingSettings(time_limit=time_limit, seed=seed, **settings)  # wrong ones fail before there is work to lose
    chains = _build(build, n_members, seed)
    first = chains[0]
    x, y = first.check_inputs(x), first.check_targets(y)
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows, but y has {len(y)}; expected one target for each row.")
    if len(x) < 2:
        raise ValueError(f"x has {len(x)} row; expected at least 2 to learn from.")
    weights = checked_weights(sample_weight, x, y)
    x, y, weights, held_out = _split(first, x, y, weights, validation, seed)
    for chain in chains:
        if not bool(chain.space.fitted):
            chain.space.fit(y)
    factors: list[EnergyRegressionModel | EnergyEnsemble] = []
    histories: list[list[History]] = []
    for position, output in enumerate(first.order):
        table = first.table(position, x, y)
        pair = None
        if held_out is not None:
            pair = first.table(position, *held_out[:2]), held_out[1][:, [output]], *held_out[2:]
        models = [chain.factors[position] for chain in chains]
        left = time_left(time_limit, started, len(first.order) - position)
        arguments: dict[str, Any] = {
            "sample_weight": weights, "validation": pair, "time_limit": left, "seed": seed, **settings,
        }  # fmt: skip
        target = y[:, [output]]
        if n_members == 1:
            assert isinstance(models[0], EnergyRegressionModel)
            histories.append([fit(models[0], table, target, **arguments)])
            factors.append(models[0])
        else:
            ensemble = fit_ensemble(models, table, target, **arguments)  # type: ignore[arg-type]
            histories.append(ensemble.histories)
            factors.append(ensemble)
    result = EnergyChain(factors, first.order)
    result.histories = histories
    return result.eval()


def _build(build: Any, n_members: int, seed: int) -> list[EnergyChain]:
    if isinstance(build, torch.nn.Module) or not callable(build):
        raise ValueError(
            f"build is a {type(build).__name__}; expected a callable without arguments that makes an untrained chain, "
            "such as lambda: EnergyChain.for_table(3, Real(2))."
        )
    chains = built(build, n_members, seed)
    for chain in chains:
        if not isinstance(chain, EnergyChain):
            raise ValueError(f"build returned a {type(chain).__name__}; expected an EnergyChain.")
        if any(isinstance(factor, EnergyEnsemble) for factor in chain.factors):
            raise ValueError("build returned a chain of ensembles; expected one of single models. Pass n_members.")
    return chains


def _split(
    chain: EnergyChain, x: Tensor, y: Tensor, weights: Tensor | None, validation: Any, seed: int
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...] | None]:
    """Rows to train on with their weights, and what is held out: inputs, targets and perhaps weights."""
    if validation is None:
        return x, y, weights, None
    if isinstance(validation, (tuple, list)):
        if len(validation) not in (2, 3):
            raise ValueError(f"validation has {len(validation)} entries; expected a pair (x_val, y_val).")
        pair = chain.check_inputs(validation[0]), chain.check_targets(validation[1])
        if len(pair[0]) != len(pair[1]):
            raise ValueError(f"x_val has {len(pair[0])} rows, but y_val has {len(pair[1])}; expected as many.")
        return x, y, weights, (*pair, *validation[2:])
    fraction = 0.1 if isinstance(validation, str) and validation == "auto" else validation
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise ValueError(f"validation is {validation!r}; expected a fraction in (0, 1), (x_val, y_val) or None.")
    if weights is not None:
        x, y, weights = (part[weights > 0] for part in (x, y, weights))
    rows, chosen = split(len(y), float(fraction), seed)
    if weights is None:
        return x[rows], y[rows], None, (x[chosen], y[chosen])
    return x[rows], y[rows], weights[rows], (x[chosen], y[chosen], weights[chosen])
