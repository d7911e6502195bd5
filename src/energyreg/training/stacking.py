"""Several models as one: weights are stacked, and each layer is one batched product.

The rows of a step are those of all members, one member after the other: row s B + b is row b of member s. An objective
knows nothing of this, and neither does AdamW, which works element by element; so n trainings in one are n separate
trainings, in as many operations as one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from energyreg.densities.mixtures import GaussianMixture
from energyreg.models.model import EnergyRegressionModel
from energyreg.networks.encoders import Dropout, TwinEncoder
from energyreg.training.history import History
from energyreg.training.loop import Job, Training

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class CannotStackError(Exception):
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
            if isinstance(copies[0], Dropout):  # the first is what is called, with the probabilities of all
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
        raise CannotStackError(f"the proposal returns a {type(q).__name__}, and only a GaussianMixture can be stacked")
    return (q.log_mixing, q.means, q.scales) if q.factor is None else (q.log_mixing, q.means, q.scales, q.factor)


class Stack:
    """One model on the stacked weights of several; the rows of a batch are those of the members, one after the other.

    Args:
        members: The members, all with the same preprocessing.

    Raises:
        CannotStackError: They cannot be trained in one pass.
    """

    def __init__(self, members: list[EnergyRegressionModel]) -> None:
        check_structure(members)
        self.members = members
        self.model = self.join(members)
        self.parts = [part for part in self.model.modules() if isinstance(part, _Stacked)]
        self.linked = False

    @staticmethod
    def join(members: Sequence[EnergyRegressionModel]) -> EnergyRegressionModel:
        """The model of stacked parts."""

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

    def try_out(self, x: Tensor, y: Tensor) -> None:
        """Find out on a few rows whether the model does what its members do.

        Raises:
            CannotStackError: It does not.
        """
        _try_out(self.model, self.members, x, y)

    def link(self) -> None:
        """Make the members views of the trained weights, on their device and in their precision."""
        for member in self.members:
            member.to(device=self.model.device, dtype=self.model.dtype)
        for part in self.parts:
            part.link()
        self.linked = True

    def release(self) -> None:
        """Give the members weights of their own again."""
        if self.linked:
            for part in self.parts:
                part.release()


def check_structure(members: Sequence[EnergyRegressionModel]) -> None:
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
            raise CannotStackError(f"members 0 and {number} differ in their structure")
    first = members[0]
    encoder = first.encoder
    encoders = [encoder.energy, encoder.proposal] if isinstance(encoder, TwinEncoder) else [encoder]
    stacked = [part for part in (*encoders, first.head, first.proposal) if part is not None]
    owner: dict[int, int] = {}
    for number, part in enumerate(stacked):
        for parameter in part.parameters():
            if owner.setdefault(id(parameter), number) != number:
                raise CannotStackError("its parts have weights in common")
    if any(id(parameter) not in owner for parameter in first.parameters()):
        raise CannotStackError("the base or the space has parameters")


@torch.no_grad()
def _try_out(model: EnergyRegressionModel, members: Sequence[EnergyRegressionModel], x: Tensor, y: Tensor) -> None:
    """Find out on a few rows whether the stacked model does what its members do."""
    rows = x.to(model.device), y.to(model.device)
    tiled = [tensor.repeat(len(members), *(1,) * (tensor.ndim - 1)) for tensor in rows]
    trial = copy.deepcopy(members[0]).train()
    before = {name: buffer.clone() for name, buffer in trial.named_buffers()}
    _values(trial, *rows)
    if any(not torch.equal(buffer, before[name]) for name, buffer in trial.named_buffers()):
        raise CannotStackError("a part of the model keeps running statistics, as batch normalisation does")
    try:
        with warnings.catch_warnings(record=True):
            model.train()
            _values(model, *tiled)
            together = [values.unflatten(-1, (len(members), -1)) for values in _values(model.eval(), *tiled)]
    except CannotStackError:
        raise
    except Exception as error:  # vmap refuses in many ways
        raise CannotStackError(f"torch.func.vmap refuses a part of the model ({error})") from error
    for number, member in enumerate(members):
        alone = _values(member.eval(), *rows)
        if any(
            not torch.allclose(a, b[..., number, :], rtol=1e-3, atol=1e-3, equal_nan=True)
            for a, b in zip(alone, together, strict=True)
        ):
            raise CannotStackError("the model gives other values under torch.func.vmap than by itself")


def _values(model: EnergyRegressionModel, x: Tensor, y: Tensor) -> list[Tensor]:
    """Energies and log q at the targets, (B,), and at targets shared by all rows, (2, B)."""
    f, q, z = model.condition(x, y)
    shared = z[:2, None]
    return [f(z), f(shared)] + ([] if q is None else [q.log_prob(z)])


class StackedTraining(Training):
    """The training of a stack, in which each member is a model of its own."""

    def __init__(self, fabric: Fabric, job: Job, stack: Stack) -> None:
        self.members = stack.members
        super().__init__(fabric, job)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        stack.link()

    @staticmethod
    def is_matrix(parameter: Tensor) -> bool:
        return parameter.ndim >= 3

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(g, dim=tuple(range(1, g.ndim))) for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        # As torch.nn.utils.clip_grad_norm_ does for each member.
        scale = (limit / (norm + 1e-6)).clamp_max(1.0)
        if not self.eager or bool((scale < 1).any()):
            for gradient in gradients:
                gradient.mul_(scale.reshape(-1, *(1,) * (gradient.ndim - 1)))
        return norm

    def models(self) -> Sequence[EnergyRegressionModel]:
        return self.members

    def keep(self, member: int) -> None:
        stacked = {id(parameter) for parameter in self.parameters}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in stacked:
                self.kept[name][member].copy_(parameter.detach()[member])

    def summary(self) -> History:
        losses = [sum(column) / len(column) for column in zip(*(h.train_loss for h in self.histories), strict=True)]
        nlls = [sum(column) / len(column) for column in zip(*(h.validation_nll for h in self.histories), strict=True)]
        best = nlls.index(min(nlls)) + 1 if nlls else None
        return History(losses, nlls, best_epoch=best, stopped_early=self.histories[0].stopped_early)
