"""Training of ensembles: `fit_ensemble` trains all members in one pass, as one model whose layers are batched products.

The members' weights are stacked, and the rows of a step are those of all members, one member after the other: row
s B + b is row b of member s. An objective knows nothing of this, and neither does AdamW, which works element by
element; so n trainings in one are n separate trainings, in as many operations as one.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.data import DataLoader

from energyreg.checks import check_count
from energyreg.densities.mixtures import GaussianMixture
from energyreg.models.ensemble import EnergyEnsemble, disagreement
from energyreg.models.model import EnergyRegressionModel
from energyreg.networks.encoders import QuantileNormalizer, TwinEncoder, _Dropout
from energyreg.randomness import caller_random_state, seed_global
from energyreg.training import loop as training
from energyreg.training.loop import History

__all__ = ["fit_ensemble"]

Build = Callable[[], EnergyRegressionModel]


def fit_ensemble(
    build: Build | Sequence[EnergyRegressionModel],
    x: Any,
    y: Any = None,
    *,
    n_members: int | None = None,
    sample_weight: Any = None,
    objective: Any = None,
    validation: Any = "auto",
    epochs: int = 100,
    batch_size: int | None = None,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    schedule: str = "one-cycle",
    gradient_clip: float | None = 10.0,
    averaging: float | None = None,
    patience: int | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
    accelerator: Any = None,
    devices: Any = 1,
    precision: Any = "32-true",
    strategy: Any = "auto",
) -> EnergyEnsemble:
    """Train several models on the same data, all in one pass, and return them as an ensemble.

    Member i has the initial weights that ``torch.manual_seed(seed + i)`` gives, and the order of rows that
    ``fit(..., seed=seed + i)`` would take; its own dropout, its own limit on the gradient, and at the end the weights
    of its own best epoch. All members share the rows held out for validation, the units of x and y, and the random
    points of the objective where its rows share them.

    What cannot be batched is trained one after the other by :func:`energyreg.fit`, with the same kind of result: with a
    DataLoader, several devices or precision "16-mixed"; members of different structure; and parts that keep running
    statistics (batch normalisation) or that :func:`torch.func.vmap` refuses. A warning says so where it is not plain
    from the arguments. Then each member has its own folder in `checkpoint_dir`, `patience` counts for each member by
    itself, Ctrl-C ends the ensemble with the members that were reached, and each member that is left gets an equal
    share of the time that is left.

    Args:
        build: Makes an untrained model, called without arguments; or the models, of which those that were fitted before
            keep their units and are trained further.
        x: As in :func:`energyreg.fit`, like all arguments that are not described here.
        y: As in `fit`.
        n_members: How many models to build; 5 by default. Models that are given are counted.
        sample_weight: As in `fit`.
        objective: As in `fit`.
        validation: As in `fit`; the fraction is chosen by `seed`, the same rows for all members.
        epochs: As in `fit`.
        batch_size: As in `fit`: rows of each member per step.
        learning_rate: As in `fit`.
        weight_decay: As in `fit`.
        schedule: As in `fit`.
        gradient_clip: As in `fit`: largest norm of the gradient of each member.
        averaging: As in `fit`.
        patience: Stop after this many epochs in which no member has improved; None for never.
        time_limit: As in `fit`: seconds for all members together.
        seed: Seed of the first member; member i has seed + i.
        checkpoint_dir: As in `fit`.
        resume: As in `fit`.
        progress: As in `fit`; it shows means over the members.
        accelerator: As in `fit`.
        devices: As in `fit`.
        precision: As in `fit`.
        strategy: As in `fit`.

    Returns:
        The ensemble, in evaluation mode, with the history of each member as its `histories`.

    Raises:
        ValueError: If data or arguments cannot be used, or the members have different units or base measures.
        TrainingError: If a loss or gradient of one of the members is not finite, or its loss explodes; the message
            names the member.
        energyreg.CheckpointError: If resume finds a damaged checkpoint, or one of other settings or
        data. OSError: If `checkpoint_dir` cannot be written, or has no room.

    >>> import torch
    >>> x = torch.rand(200, 2)
    >>> y = x[:, 0] + 0.1 * torch.randn(200)
    >>> def build():
    ...     return EnergyRegressionModel.for_table(num_features=2, width=16)
    >>> ensemble = fit_ensemble(build, x, y, n_members=3, epochs=2)
    >>> ensemble(x).log_prob(y).shape
    torch.Size([200])
    """
    arguments = {
        "objective": objective, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
        "weight_decay": weight_decay, "schedule": schedule, "gradient_clip": gradient_clip,
        "averaging": averaging, "patience": patience, "resume": resume, "progress": progress,
        "accelerator": accelerator, "devices": devices, "precision": precision, "strategy": strategy,
    }  # fmt: skip
    started = time.perf_counter()
    training._check_time_limit(time_limit)
    members = _build(build, n_members, seed)
    reason = _refused_arguments(x, accelerator, devices, precision, strategy, members[0])
    if reason is None:
        # Preprocessing that is there serves the members that have none.
        first = next((member for member in members if member.fitted), members[0])
        assemble = _Assemble(members, first)
        try:
            histories = training._fit(
                first, x, y, sample_weight=sample_weight, validation=validation, seed=seed,
                checkpoint_dir=checkpoint_dir, assemble=assemble,
                time_limit=_time_left(time_limit, started, 1), **arguments,
            )  # fmt: skip
            return _ensemble(members, histories)
        except _CannotStackError as error:
            warnings.warn(f"The members are trained one after the other, which takes longer: {error}.", stacklevel=2)
        finally:
            assemble.release()
    return _one_after_the_other(
        members, x, y, sample_weight, validation, seed, checkpoint_dir, time_limit, started, arguments
    )


def _time_left(time_limit: float | None, started: float, members: int) -> float | None:
    """Seconds that each of the members that are left may take; more than 0, as each makes a step at least."""
    if time_limit is None:
        return None
    return max((started + time_limit - time.perf_counter()) / members, 1e-3)


# ---------------------------------------------------------------------------------------------- the members


def _build(build: Any, n_members: int | None, seed: int) -> list[EnergyRegressionModel]:
    if isinstance(build, (list, tuple)):
        members = list(build)
        if n_members not in (None, len(members)):
            raise ValueError(f"n_members is {n_members}, but build has {len(members)} models; leave n_members out.")
        if not members:
            raise ValueError("build is empty; expected at least one model, or a callable that makes one.")
        if len({id(member) for member in members}) < len(members):
            raise ValueError("build holds one model several times; expected models with weights of their own.")
    else:
        if isinstance(build, nn.Module) or not callable(build):
            raise ValueError(
                f"build is a {type(build).__name__}; expected a callable without arguments that makes an untrained "
                "model, such as lambda: EnergyRegressionModel.for_table(num_features=3), or a sequence of models."
            )
        n_members = 5 if n_members is None else n_members
        check_count("n_members", n_members)
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise ValueError(f"seed is {seed!r}; expected a whole number.")
        members = []
        with caller_random_state():
            device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
            for member in range(n_members):
                seed_global(seed + member, device)
                members.append(build())
    for number, member in enumerate(members):
        if not isinstance(member, EnergyRegressionModel):
            what = "build returned" if callable(build) else f"build[{number}] is"
            raise ValueError(f"{what} a {type(member).__name__}; expected an EnergyRegressionModel.")
    owner: dict[int, int] = {}
    for number, member in enumerate(members):
        for name, parameter in member.named_parameters():
            if parameter.requires_grad and owner.setdefault(id(parameter), number) != number:
                raise ValueError(
                    f"Members {owner[id(parameter)]} and {number} share the parameter {name!r}; expected members with "
                    "weights of their own. Build each part anew for each member, or freeze what they are to share "
                    "(requires_grad=False)."
                )
    return members


def _ensemble(members: list[EnergyRegressionModel], histories: list[History]) -> EnergyEnsemble:
    ensemble = EnergyEnsemble(members)
    ensemble.histories = histories
    return ensemble.eval()


def _fit_preprocessing(
    members: Sequence[EnergyRegressionModel],
    first: EnergyRegressionModel,
    preprocessing: tuple[Tensor | None, Tensor] | None,
) -> None:
    """Give all members the units of the first, which has been fitted."""
    for number, member in enumerate(members):
        if member is first:
            continue
        for part in ("space", "base"):
            if not bool(getattr(member, part).fitted) and type(getattr(member, part)) is type(getattr(first, part)):
                setattr(member, part, copy.deepcopy(getattr(first, part)))
        for mine, fitted in zip(member.encoder.modules(), first.encoder.modules(), strict=False):
            same = isinstance(mine, QuantileNormalizer) and isinstance(fitted, QuantileNormalizer)
            if same and not bool(mine.fitted) and mine.knots.shape == fitted.knots.shape:
                mine.load_state_dict(fitted.state_dict())
        if not member.fitted and preprocessing is not None:
            member.fit_preprocessing(*preprocessing)
        if difference := disagreement(first, member):
            raise ValueError(
                f"Members {members.index(first)} and {number} have different {difference}, so that their densities "
                "cannot be mixed. Build all members with the same space and base, and fit none of them to other data."
            )


def _refused_arguments(
    x: Any, accelerator: Any, devices: Any, precision: Any, strategy: Any, model: EnergyRegressionModel
) -> str | None:
    """What of the arguments keeps the members from being trained in one pass; None if nothing does."""
    if isinstance(x, DataLoader):
        return "x is a DataLoader"
    if str(precision) == "16-mixed":
        return "its loss scale is one for all weights"
    if strategy != "auto":
        return "strategy"
    if devices != 1 and training._make_fabric(
        *training._device_of(model, accelerator, devices), precision, strategy
    ).world_size > 1:  # fmt: skip
        return "several devices"
    return None


# ---------------------------------------------------------------------------------------------- stacked modules


class _CannotStackError(Exception):
    """The members cannot be trained in one pass; the message says why."""


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, under each of their names."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


class _Stacked(nn.Module):
    """n modules of one structure, each applied to rows of its own: n batches one after the other in, the same out.

    Weights are stacked, (n, ...). Buffers and frozen weights that all modules agree on are kept once.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = tuple(modules)  # a tuple, which nn.Module does not look into
        self.keys: dict[str, tuple[str, int | None]] = {}
        columns = [_tensors(module) for module in modules]
        known: dict[int, tuple[str, int | None]] = {}  # tied weights are one
        for name, tensor in columns[0].items():
            if id(tensor) not in known:
                tensors = [column[name] for column in columns]
                key = name.replace(".", "/")
                shared = not tensor.requires_grad and all(torch.equal(tensor, other) for other in tensors)
                value = tensor.detach().clone() if shared else torch.stack([t.detach() for t in tensors])
                if tensor.requires_grad:
                    self.register_parameter(key, nn.Parameter(value))
                else:
                    self.register_buffer(key, value)
                known[id(tensor)] = key, None if shared else 0
            self.keys[name] = known[id(tensor)]
        self.dims = {f"module.{name}": dim for name, (_, dim) in self.keys.items()}

    def train(self, mode: bool = True) -> _Stacked:
        """Set the mode of the modules, too."""
        for module in self.members:
            module.train(mode)
        return super().train(mode)

    def link(self) -> None:
        """Make the modules' tensors views of the stacked ones, so that the modules are what is trained."""
        self._assign(lambda tensor: tensor)

    def release(self) -> None:
        """Give the modules tensors of their own again."""
        self._assign(torch.clone)

    @torch.no_grad()
    def _assign(self, how: Callable[[Tensor], Tensor]) -> None:
        for member, module in enumerate(self.members):
            done = set()
            for name, tensor in _tensors(module).items():
                if id(tensor) not in done:
                    done.add(id(tensor))
                    key, dim = self.keys[name]
                    value = getattr(self, key).detach()
                    tensor.data = how(value if dim is None else value[member])

    def split(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The rows by member: a dimension of n b rows becomes two, of n members and b rows."""
        return rows.unflatten(dim, (len(self.members), -1))

    def map(self, function: Callable[..., Any], *inputs: Tensor, in_dims: Sequence[int | None], out_dims: Any) -> Any:
        """Call ``function(module, *inputs)`` for all modules at once, each with its weights."""
        call = _Call(self.members[0], function)

        def one(tensors: dict[str, Tensor], *inputs: Tensor) -> Any:
            return functional_call(call, tensors, inputs)

        tensors = {f"module.{name}": getattr(self, key) for name, (key, _) in self.keys.items()}
        batched = vmap(one, in_dims=(self.dims, *in_dims), out_dims=out_dims, randomness="different")
        return batched(tensors, *inputs)


class _Call(nn.Module):
    """A function of a module as a module, for `functional_call`."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.module, *inputs)


def _forward(module: nn.Module, *inputs: Tensor) -> Any:
    return module(*inputs)


class _StackedEncoder(_Stacked):
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules)
        if isinstance(shape := getattr(modules[0], "input_shape", None), tuple):
            self.input_shape = shape
        if isinstance(columns := getattr(modules[0], "num_features", None), int):
            self.num_features = columns
        for copies in zip(*(module.modules() for module in modules), strict=True):
            if isinstance(copies[0], _Dropout):  # the first is what is called, with the probabilities of all
                copies[0].active = any(copy.active for copy in copies)

    def forward(self, x: Tensor) -> Tensor:
        """Contexts (n b, C) of inputs (n b, ...)."""
        return self.map(_forward, self.split(x), in_dims=(0,), out_dims=0).flatten(0, 1)


class _StackedHead(_Stacked):
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules)
        if getattr(modules[0], "own_and_shared", None) is not None:
            self.own_and_shared = self._own_and_shared

    def forward(self, context: Tensor, v: Tensor) -> Tensor:
        """Values (*S, n b) for contexts (n b, C) and targets (*S, n b, D), or (*S, 1, D) shared by all rows."""
        contexts, place = self.split(context), v.ndim - 2
        if v.shape[-2] == 1 and len(context) > 1:
            g = self.map(_forward, contexts, v, in_dims=(0, None), out_dims=place)
        else:
            g = self.map(_forward, contexts, self.split(v, place), in_dims=(0, place), out_dims=place)
        return g.flatten(-2)

    def _own_and_shared(self, context: Tensor, own: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Values at each row's own target, (n b,), and at shared ones, (G, n b); see the head's."""
        contexts, targets = self.split(context), self.split(own)
        a, b = self.map(_own_and_shared, contexts, targets, shared, in_dims=(0, 0, None), out_dims=(0, 1))
        return a.flatten(), b.flatten(1)


def _own_and_shared(head: Any, *inputs: Tensor) -> Any:
    return head.own_and_shared(*inputs)


class _StackedProposal(_Stacked):
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules)
        self.periodic = getattr(modules[0], "periodic", None)

    def forward(self, context: Tensor) -> GaussianMixture:
        """The mixtures of n b rows for contexts (n b, C)."""
        parameters = self.map(_parameters, self.split(context), in_dims=(0,), out_dims=0)
        logits, means, scales, *factor = (tensor.flatten(0, 1) for tensor in parameters)
        return GaussianMixture(logits, means, scales, factor[0] if factor else None, self.periodic)


def _parameters(proposal: nn.Module, context: Tensor) -> tuple[Tensor, ...]:
    q = proposal(context)
    if not isinstance(q, GaussianMixture):
        raise _CannotStackError(f"the proposal returns a {type(q).__name__}, and only a GaussianMixture can be stacked")
    return (q.log_mixing, q.means, q.scales) if q.factor is None else (q.log_mixing, q.means, q.scales, q.factor)


# ---------------------------------------------------------------------------------------------- one model of many


class _Assemble:
    """Makes of the members one model on stacked weights; see `energyreg.training._Assemble`.

    Args:
        members: The members.
        first: The one whose preprocessing is fitted.
    """

    def __init__(self, members: list[EnergyRegressionModel], first: EnergyRegressionModel) -> None:
        self.members, self.first, self.num_members = members, first, len(members)
        self.stacked: list[_Stacked] = []
        self.linked = False

    def __call__(self, preprocessing: tuple[Tensor | None, Tensor] | None, data: Any) -> EnergyRegressionModel:
        _fit_preprocessing(self.members, self.first, preprocessing)
        data.num_members = self.num_members
        _check_structure(self.members)
        model = self._join(self.members)
        x, y = data.sample()
        _try_out(model, self.members, x[:4], y[:4])
        self.stacked = [part for part in model.modules() if isinstance(part, _Stacked)]
        return model

    @staticmethod
    def _join(members: Sequence[EnergyRegressionModel]) -> EnergyRegressionModel:
        def parts(name: str) -> list[Any]:
            return [getattr(member, name) for member in members]

        first = members[0]
        encoder: nn.Module
        if isinstance(first.encoder, TwinEncoder):
            encoder = TwinEncoder(
                *(
                    _StackedEncoder([getattr(part, name) for part in parts("encoder")])
                    for name in ("energy", "proposal")
                )
            )
        else:
            encoder = _StackedEncoder(parts("encoder"))
        return EnergyRegressionModel(
            encoder,
            None if first.head is None else _StackedHead(parts("head")),
            proposal=None if first.proposal is None else _StackedProposal(parts("proposal")),
            base=first.base,
            space=first.space,
            detach_context=first.detach_context,
        )

    def training(self, fabric: Any, job: Any) -> _StackedTraining:
        """The training of the stacked model."""
        return _StackedTraining(fabric, job, self)

    def link(self, model: EnergyRegressionModel) -> None:
        """Make the members views of the trained weights, on their device and in their precision."""
        for member in self.members:
            member.to(device=model.device, dtype=model.dtype)
        for part in self.stacked:
            part.link()
        self.linked = True

    def release(self) -> None:
        """Give the members weights of their own again."""
        if self.linked:
            for part in self.stacked:
                part.release()


def _check_structure(members: Sequence[EnergyRegressionModel]) -> None:
    """Find out whether the members are the same but for the values of their tensors."""

    def settings(module: nn.Module) -> dict[str, Any]:
        plain = (bool, int, float, str, tuple, type(None))
        # What made the initial weights does not matter any more, nor do probabilities of dropout, which are stacked.
        others = ("training", *getattr(module, "only_initial", ()))
        own = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in others}
        return {name: value for name, value in own.items() if isinstance(value, plain)}

    def description(model: EnergyRegressionModel) -> Iterator[Any]:
        for name, module in model.named_modules(remove_duplicate=False):
            yield name, type(module), settings(module)
        numbers: dict[int, int] = {}
        for name, tensor in _tensors(model).items():
            tied = numbers.setdefault(id(tensor), len(numbers))
            yield name, tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad, tied

    descriptions = [list(description(member)) for member in members]
    for number, other in enumerate(descriptions):
        if other != descriptions[0]:
            raise _CannotStackError(f"members 0 and {number} differ in their structure")
    first = members[0]
    encoder = first.encoder
    encoders = [encoder.energy, encoder.proposal] if isinstance(encoder, TwinEncoder) else [encoder]
    stacked = [part for part in (*encoders, first.head, first.proposal) if part is not None]
    owner: dict[int, int] = {}
    for number, part in enumerate(stacked):
        for parameter in part.parameters():
            if owner.setdefault(id(parameter), number) != number:
                raise _CannotStackError("its parts have weights in common")
    if any(id(parameter) not in owner for parameter in first.parameters()):
        raise _CannotStackError("the base or the space has parameters")


@torch.no_grad()
def _try_out(model: EnergyRegressionModel, members: Sequence[EnergyRegressionModel], x: Tensor, y: Tensor) -> None:
    """Find out on a few rows whether the stacked model does what its members do."""
    rows = x.to(model.device), y.to(model.device)
    tiled = [tensor.repeat(len(members), *(1,) * (tensor.ndim - 1)) for tensor in rows]
    trial = copy.deepcopy(members[0]).train()
    before = {name: buffer.clone() for name, buffer in trial.named_buffers()}
    _values(trial, *rows)
    if any(not torch.equal(buffer, before[name]) for name, buffer in trial.named_buffers()):
        raise _CannotStackError("a part of the model keeps running statistics, as batch normalisation does")
    try:
        with warnings.catch_warnings(record=True):
            model.train()
            _values(model, *tiled)
            together = [values.unflatten(-1, (len(members), -1)) for values in _values(model.eval(), *tiled)]
    except _CannotStackError:
        raise
    except Exception as error:  # vmap refuses in many ways
        raise _CannotStackError(f"torch.func.vmap refuses a part of the model ({error})") from error
    for number, member in enumerate(members):
        alone = _values(member.eval(), *rows)
        if any(
            not torch.allclose(a, b[..., number, :], rtol=1e-3, atol=1e-3, equal_nan=True)
            for a, b in zip(alone, together, strict=True)
        ):
            raise _CannotStackError("the model gives other values under torch.func.vmap than by itself")


def _values(model: EnergyRegressionModel, x: Tensor, y: Tensor) -> list[Tensor]:
    """Energies and log q at the targets, (B,), and at targets shared by all rows, (2, B)."""
    f, q, z = model.condition(x, y)
    shared = z[:2, None]
    return [f(z), f(shared)] + ([] if q is None else [q.log_prob(z)])


# ---------------------------------------------------------------------------------------------- the loop


class _StackedTraining(training._Training):
    def __init__(self, fabric: Any, job: Any, assemble: _Assemble) -> None:
        self.members = assemble.members
        super().__init__(fabric, job)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        assemble.link(self.model)

    @staticmethod
    def _is_matrix(parameter: Tensor) -> bool:
        return parameter.ndim >= 3

    @torch.no_grad()
    def _clip(self, limit: float) -> Tensor:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(g, dim=tuple(range(1, g.ndim))) for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        # As torch.nn.utils.clip_grad_norm_ does for each member.
        scale = (limit / (norm + 1e-6)).clamp_max(1.0)
        if not self.eager or bool((scale < 1).any()):
            for gradient in gradients:
                gradient.mul_(scale.reshape(-1, *(1,) * (gradient.ndim - 1)))
        return norm

    def _models(self) -> Sequence[EnergyRegressionModel]:
        return self.members

    def _keep(self, member: int) -> None:
        stacked = {id(parameter) for parameter in self.parameters}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in stacked:
                self.kept[name][member].copy_(parameter.detach()[member])

    def _summary(self) -> History:
        losses = [sum(column) / len(column) for column in zip(*(h.train_loss for h in self.histories), strict=True)]
        nlls = [sum(column) / len(column) for column in zip(*(h.validation_nll for h in self.histories), strict=True)]
        best = nlls.index(min(nlls)) + 1 if nlls else None
        return History(losses, nlls, best_epoch=best, stopped_early=self.histories[0].stopped_early)


# ---------------------------------------------------------------------------------------------- one after the other


def _one_after_the_other(
    members: list[EnergyRegressionModel],
    x: Any,
    y: Any,
    sample_weight: Any,
    validation: Any,
    seed: int,
    checkpoint_dir: Any,
    time_limit: float | None,
    started: float,
    arguments: dict[str, Any],
) -> EnergyEnsemble:
    weights = training._checked_weights(sample_weight, x, y)
    batch_size = arguments["batch_size"]
    if batch_size is None:
        batch_size = training._default_batch_size(y if weights is None else weights[weights > 0])
    arguments = {**arguments, "batch_size": batch_size}
    names = (
        "epochs",
        "batch_size",
        "learning_rate",
        "weight_decay",
        "schedule",
        "gradient_clip",
        "averaging",
        "patience",
    )
    settings = training._Settings(
        **{name: arguments[name] for name in names}, seed=seed, precision=str(arguments["precision"])
    )
    first = next((member for member in members if member.fitted), members[0])
    with caller_random_state():
        data, held_out, preprocessing = training._prepare(first, x, y, weights, validation, settings)
        if preprocessing is not None:
            first.fit_preprocessing(*preprocessing)
        _fit_preprocessing(members, first, preprocessing)
    if isinstance(data, training._Rows):
        x, y, weights = data.x, data.y, data.weights
    if isinstance(held_out, training._Rows):
        validation = held_out.x, held_out.y, held_out.weights
    histories: list[History] = []
    for number, member in enumerate(members):
        folder = None if checkpoint_dir is None else Path(checkpoint_dir) / f"member-{number}"
        try:
            history = training.fit(
                member, x, y, sample_weight=weights, validation=validation, seed=seed + number, checkpoint_dir=folder,
                time_limit=_time_left(time_limit, started, len(members) - number), **arguments,
            )  # fmt: skip
            histories.append(history)
        except training.TrainingError as error:
            raise training.TrainingError(f"Member {number} (seed {seed + number}): {error}") from error
        if histories[-1].interrupted:
            break
    return _ensemble(members[: len(histories)], histories)
