"""Save and load: one safetensors file a model, without pickle and without running code that the file names.

The file holds the tensors of ``model.state_dict()`` and, as its metadata, the constructor arguments of every part of
the model as JSON. Loading calls the constructors of this library's own classes with these arguments, and nothing else:
a part that is not the library's is handed to :func:`load` by the caller. A checksum over everything detects damage. It
is no signature: whoever can write the file can write a valid one, with other weights.

So a file is data, not a programme. What it describes is of the types that the constructors are annotated with. An
argument that may be a path does I/O: it is never stored, and refused where a file has it. The model is built without
memory first (on torch's device "meta"), and only where all tensors fit their places are they allocated.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import math
import os
import re
import threading
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from energyreg import files
from energyreg.checks import check_type
from energyreg.densities import bases, spaces
from energyreg.files import CheckpointError, read_tensors, version, with_suffix, write_tensors
from energyreg.models.chain import ChainEncoder, EnergyChain
from energyreg.models.ensemble import EnergyEnsemble, disagreement
from energyreg.models.model import EnergyRegressionModel
from energyreg.modes import as_usual, make_trainable
from energyreg.networks import encoders, heads, image_encoders, proposals
from energyreg.randomness import RandomSource

__all__ = [
    "CheckpointError",
    "check_sizes",
    "load",
    "load_estimator",
    "load_training_state",
    "reading",
    "save",
    "save_estimator",
    "save_training_state",
]

STATE = "state."
"""Begins the names of tensors of modules in an estimator's state."""

# The only classes that a file can name. The list comes from our own modules, never from a file.
KNOWN_CLASSES: tuple[type[nn.Module], ...] = (
    EnergyRegressionModel,
    EnergyEnsemble,
    EnergyChain,
    ChainEncoder,
    *(
        member
        for module in (spaces, bases, proposals, heads, encoders, image_encoders)
        for member in (getattr(module, name) for name in module.__all__)
        if isinstance(member, type) and issubclass(member, nn.Module)
    ),
)
PARTS = ("encoder", "head", "proposal", "base", "space")
Model: TypeAlias = EnergyRegressionModel | EnergyEnsemble | EnergyChain
LARGEST_SIZE = 2**16
"""A size that may be described whatever tensors a file has."""
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
SPARE_MODULES, SPARE_PARTS, SPARE_ELEMENTS = 20, 2000, 2**25
"""What is described, or made, beyond the tensors of a file: a classifier, say, that is left out later."""
TOO_LARGE = "its description is of a far larger model than the file has tensors for."
# Where a model stands in a description: by itself, as a member of an ensemble, or as a factor of a chain.
MODEL_PLACE = re.compile(r"model(\.factors\[\d+\])?(\.members\[\d+\])?")


@as_usual
def save(model: Model, path: str | os.PathLike[str]) -> Path:
    """Write a model, an ensemble with all its members, or a chain with all its factors, to one safetensors file.

    The file is written beside its final place and moved there when it is complete, so that an interrupted or failed
    write leaves an older file as it was. Parts that are not this library's (your own encoder, a zuko flow) are stored
    by their weights and their class name only; hand them to :func:`load`.

    Args:
        model: The model, trained or not, on any device.
        path: File to write. The suffix ``.safetensors`` is appended where it is missing; missing folders are created.

    Returns:
        The path of the file, with its suffix.

    Raises:
        CheckpointError: If model is no EnergyRegressionModel, EnergyEnsemble or EnergyChain, or holds something that
            cannot be stored.
        OSError: If the file cannot be written (a read-only or full disk); the message says so, an older file is intact.
    """
    path = with_suffix(path)
    if type(model) not in (EnergyRegressionModel, EnergyEnsemble, EnergyChain):
        raise CheckpointError(
            f"save() was given a {type(model).__name__}; expected an EnergyRegressionModel, EnergyEnsemble or "
            "EnergyChain (not a subclass: a file cannot rebuild one). For other modules use "
            "safetensors.torch.save_file(module.state_dict(), path)."
        )
    config = json.dumps(_describe(model, "model", {}), allow_nan=False)
    _check_finite(model)
    write_tensors(path, model.state_dict(), files.MODEL, {"config": config})
    return path


@as_usual
def load(
    path: str | os.PathLike[str],
    *,
    encoder: nn.Module | None = None,
    head: nn.Module | None = None,
    proposal: nn.Module | None = None,
    base: nn.Module | None = None,
    space: nn.Module | None = None,
    map_location: str | torch.device = "cpu",
) -> Model:
    """Read a model or an ensemble that :func:`save` wrote.

    It is in evaluation mode, and its ``log_prob`` is bit-equal to that of the saved one.

    Args:
        path: File to read, with or without its suffix ``.safetensors``.
        encoder: Your own encoder, built as it was when the model was saved; its weights are overwritten by the file's.
            Only for a model whose encoder is not this library's; the same holds for the other parts. Each member of an
            ensemble gets a copy.
        head: Your own head.
        proposal: Your own proposal.
        base: Your own base.
        space: Your own target space.
        map_location: Device of the returned model.

    Returns:
        The model, or the ensemble, whose histories are not stored.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is not a model of this library, is damaged, comes from another format version,
            names a class that this version does not know, or if a part of your own is missing, not needed, or of
            another shape.
    """
    path = with_suffix(path)
    tensors, metadata = read_tensors(path, files.MODEL)
    parts = dict(zip(PARTS, (encoder, head, proposal, base, space), strict=True))
    with reading(path):
        model = _build(metadata["config"], tensors, parts)
    return model.to(map_location).eval()


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever is wrong with the content of a file into a CheckpointError that names the file.

    Raises:
        CheckpointError: If something is raised inside.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # constructors raise whatever they find first
        what = str(error) if isinstance(error, ValueError) else repr(error)
        what = str(error) if isinstance(error, _DescriptionError) else f"its description cannot be read: {what:.500}."
        raise CheckpointError(f"Cannot load {os.fspath(path)!r}: {what}") from error


def _build(description: str, tensors: dict[str, Tensor], parts: Mapping[str, nn.Module | None]) -> Model:
    """The model that a file describes, with its tensors."""
    config = json.loads(description)
    # Constructors draw initial weights.
    with RandomSource(0).everywhere(), _no_more_than(tensors):
        check_sizes(lambda: _Builder(parts, tensors).build(config), tensors)
        model = _Builder(parts, tensors).build(config)
    if not isinstance(model, (EnergyRegressionModel, EnergyEnsemble, EnergyChain)):
        raise _DescriptionError(f"it describes a {type(model).__name__}, not an EnergyRegressionModel.")
    _fill(model, tensors)
    for ensemble in model.modules():
        members = ensemble.models() if isinstance(ensemble, EnergyEnsemble) else []
        for number, member in enumerate(members):
            if (difference := disagreement(members[0], member)) is not None:
                raise _DescriptionError(f"members[0] and members[{number}] have different {difference}.")
    return model


def save_estimator(model: Model, state: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a model together with what an estimator knows besides, with the guards of :func:`save`.

    Args:
        model: The model, or the ensemble.
        state: The rest, as for :func:`save_training_state`; target spaces may be in it, too, and other modules of this
            library, of which those at its top are stored with their weights.
        path: File to write. The suffix ``.safetensors`` is appended where it is missing.

    Returns:
        The path of the file, with its suffix.

    Raises:
        CheckpointError: If something cannot be stored.
        OSError: If the file cannot be written; an older file is intact.
    """
    path = with_suffix(path)
    metadata = {
        "config": json.dumps(_describe(model, "model", {}), allow_nan=False),
        "state": json.dumps(_describe(dict(state), "state", {}), allow_nan=False),
    }
    tensors = dict(model.state_dict())
    _check_finite(model)
    for name, part in state.items():
        if isinstance(part, nn.Module):
            _check_finite(part)
            tensors |= {f"{STATE}{name}.{key}": tensor for key, tensor in part.state_dict().items()}
    write_tensors(path, tensors, files.ESTIMATOR, metadata)
    return path


def load_estimator(
    path: str | os.PathLike[str], parts: Mapping[str, nn.Module] | None = None
) -> tuple[Model, dict[str, Any]]:
    """Read what :func:`save_estimator` wrote.

    Args:
        path: File to read, with or without its suffix.
        parts: Modules of the state that are not this library's alone, built as they were when the file was written, by
            name; their weights are overwritten.

    Returns:
        The model in evaluation mode on the CPU, and the rest of the state.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is not an estimator's, is damaged, or has another format version.
    """
    path = with_suffix(path)
    tensors, metadata = read_tensors(path, files.ESTIMATOR)
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(STATE)}
    with reading(path):
        model = _build(metadata["config"], {name: tensors[name] for name in tensors if name not in inside}, {})
        description = json.loads(metadata["state"])
        check_type("state", description, _StateNode)
        given = {name: part for name, part in (parts or {}).items() if description["dict"].pop(name, None)}
        for name, node in description["dict"].items():
            if isinstance(node, dict) and "class" in node:
                check_sizes(functools.partial(_Builder({}, tensors).build, node), _below(f"{STATE}{name}.", inside))
        with RandomSource(0).everywhere(), _no_more_than(tensors):
            state = _Builder({}, tensors).build(description, "state") | given
        for name, part in state.items():
            if isinstance(part, nn.Module):
                _fill(part, _below(f"{STATE}{name}.", inside))
                part.eval()
    return model.eval(), state


class _StateNode(typing.TypedDict):
    """How a dict is described."""

    dict: dict[str, Any]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def save_training_state(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write what is needed to resume a training, with the guards of :func:`save`.

    Args:
        path: File to write, with its suffix.
        tensors: Weights and optimiser state by name.
        state: Everything else: None, booleans, numbers, strings, and lists, tuples and dicts (with string keys) of
            these.

    Raises:
        CheckpointError: If state holds something else.
        OSError: If the file cannot be written; an older file is intact.
    """
    save_state(path, tensors, state, files.TRAINING_STATE)


def save_state(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any], kind: str
) -> None:
    """As :func:`save_training_state`, for a file of another kind, which one of the formats above names."""
    description = json.dumps(_describe(dict(state), "state", {}), allow_nan=False)
    write_tensors(Path(path), tensors, kind, {"state": description})


def load_training_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_training_state` wrote.

    Args:
        path: File to read, with its suffix.

    Returns:
        Tensors by name on the CPU, and the rest of the state.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is not a training state of this library, is damaged, or has another format version.
    """
    return load_state(path, files.TRAINING_STATE)


def load_state(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As :func:`load_training_state`, for a file of another kind."""
    tensors, metadata = read_tensors(Path(path), kind)
    with reading(path):
        description = json.loads(metadata["state"])
        check_type("state", description, _StateNode)
        state = _Builder({}).build(description, "state")
    return tensors, state


# ---------------------------------------------------------------------------------------------- a model as JSON and
# back


class _DescriptionError(ValueError):
    """The description in a file does not make a model; `load` adds the path."""


def _describe(value: Any, where: str, seen: dict[int, int]) -> Any:
    """JSON for a constructor argument; modules by class and arguments, a module met before by its number."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (list, nn.ModuleList)):
        return [_describe(item, f"{where}[{i}]", seen) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_describe(item, f"{where}[{i}]", seen) for i, item in enumerate(value)]}
    if isinstance(value, (dict, nn.ModuleDict)):
        if not all(isinstance(key, str) for key in value):
            raise CheckpointError(f"Cannot save: {where} is a dict with keys other than strings.")
        return {"dict": {key: _describe(item, f"{where}[{key!r}]", seen) for key, item in value.items()}}
    if id(value) in seen:
        return {"same": seen[id(value)]}
    if isinstance(value, nn.Module) or callable(value):
        number = seen[id(value)] = len(seen)
        if type(value) not in KNOWN_CLASSES:
            return {"custom": _qualified_name(value), "id": number}
        return {"class": type(value).__name__, "id": number, "args": _arguments(value, where, seen)}
    raise CheckpointError(
        f"Cannot save: {where} is a {type(value).__name__}; a file can hold None, booleans, numbers, strings, lists, "
        "tuples, dicts and modules."
    )


def _arguments(module: nn.Module, where: str, seen: dict[int, int]) -> dict[str, Any]:
    arguments = {}
    hints = _annotations(type(module).__init__)
    for name in list(inspect.signature(type(module).__init__).parameters)[1:]:
        if _may_be_a_path(hints.get(name)):
            continue
        if not hasattr(module, name):
            raise CheckpointError(
                f"Cannot save: {where} is a {type(module).__name__}, which does not keep its argument {name!r} under "
                "that name."
            )
        arguments[name] = _describe(getattr(module, name), f"{where}.{name}", seen)
    return arguments


def _qualified_name(value: Any) -> str:
    kind = type(value) if isinstance(value, nn.Module) else value
    return f"{getattr(kind, '__module__', '?')}.{getattr(kind, '__qualname__', type(value).__qualname__)}"


class _Builder:
    """Turns a description into objects: plain values, and modules of KNOWN_CLASSES."""

    def __init__(self, parts: Mapping[str, nn.Module | None], tensors: Mapping[str, Tensor] | None = None) -> None:
        tensors = {} if tensors is None else tensors
        self.largest = max(LARGEST_SIZE, sum(tensor.numel() for tensor in tensors.values()))
        self.modules_left = SPARE_MODULES + 2 * len(tensors)
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.classes = {kind.__name__: kind for kind in KNOWN_CLASSES}
        self.built: dict[int, Any] = {}

    def build(self, node: Any, where: str = "model") -> Any:
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if isinstance(node, list):
            return [self.build(item, f"{where}[{i}]") for i, item in enumerate(node)]
        match node:
            case {"float": "inf" | "-inf" | "nan" as text}:
                return float(text)
            case {"tuple": [*items]}:
                return tuple(self.build(item, f"{where}[{i}]") for i, item in enumerate(items))
            case {"dict": dict(items)}:
                return {key: self.build(item, f"{where}[{key!r}]") for key, item in items.items()}
            case {"same": _} | {"class": _} if self.modules_left == 0:
                raise _DescriptionError(TOO_LARGE)
            case {"same": int(number)} if number in self.built:
                self.modules_left -= 1
                return self.built[number]
            case {"class": str(name), "id": int(number), "args": dict(arguments)}:
                self.modules_left -= 1
                self.built[number] = module = self.module(name, arguments, where)
                return module
            case {"custom": str(name)}:
                inside = MODEL_PLACE.sub("", where, count=1).removeprefix(".")
                part = inside.partition(".")[0].partition("[")[0]
                raise _DescriptionError(
                    f"{where} is a {name}, which is not energyreg's: the file has its weights only. Build it as it was "
                    f"when the model was saved, and pass {'the whole ' + part if '.' in inside else 'it'} as "
                    f"load(..., {part}=...)."
                )
        raise _DescriptionError(f"{where} is described by {str(node)[:80]!r}, which this version cannot read.")

    def module(self, name: str, arguments: dict[str, Any], where: str) -> nn.Module:
        if name not in self.classes:
            raise _DescriptionError(
                f"{where} is of the class {name!r}, which this version of energyreg ({version()}) does not know. "
                "Update energyreg, or check where the file comes from."
            )
        kind = self.classes[name]
        signature = inspect.signature(kind.__init__).parameters
        if unknown := sorted(set(arguments) - set(list(signature)[1:])):
            raise _DescriptionError(
                f"{where} is a {name} with the argument {unknown[0]!r}, which this version does not know."
            )
        hints = _annotations(kind.__init__)
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        try:
            for argument, node in arguments.items():
                value, hint = self.argument(argument, node, where), hints.get(argument, Any)
                several = signature[argument].kind is inspect.Parameter.VAR_POSITIONAL
                if _may_be_a_path(hint) and value is not None:
                    raise _DescriptionError(
                        f"{where} is a {name} with {argument} = {value!r:.80}; a file holds its weights itself, and "
                        "cannot name others."
                    )
                check_type(argument, value, list[hint] if several else hint)  # type: ignore[valid-type]
                self.check_size(argument, value, hint)
                if several:
                    positional.extend(value)
                else:
                    keywords[argument] = value
            return kind(*positional, **keywords)
        except _DescriptionError:
            raise
        except Exception as error:
            raise _DescriptionError(f"{where} cannot be built as a {name}: {error}") from error

    def check_size(self, name: str, value: Any, hint: Any) -> None:
        """Refuse whole numbers, where no float would do, that are beyond all that the tensors can be the sizes of."""
        if isinstance(value, (list, tuple)):
            for item in value:
                self.check_size(name, item, hint)
        elif isinstance(value, int) and abs(value) > self.largest and "float" not in str(hint):
            raise ValueError(f"{name} is {value}; expected no more than the file has numbers")

    def argument(self, name: str, node: Any, where: str) -> Any:
        if not MODEL_PLACE.fullmatch(where) or name not in self.parts:
            return self.build(node, f"{where}.{name}")
        if isinstance(node, dict) and "same" in node:  # one part of several members
            return self.build(node, f"{where}.{name}")
        part, custom = self.parts[name], _first_custom(node)
        if custom is None:
            raise _DescriptionError(
                f"load() was given {name}=, but the file describes its {name} itself. Leave {name}= out."
            )
        # The module's own file may have been renamed or run as __main__; the class name must agree.
        top = node.get("custom") or node.get("class")
        if _qualified_name(part).rpartition(".")[2] != str(top).rpartition(".")[2]:
            raise _DescriptionError(f"the {name} was a {top}, but load() was given a {_qualified_name(part)}.")
        if where != "model":
            part = copy.deepcopy(part)
        self.built[node["id"]] = part
        return part


def _first_custom(node: Any) -> str | None:
    if isinstance(node, dict) and isinstance(node.get("custom"), str):
        return node["custom"]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next((name for child in children if (name := _first_custom(child)) is not None), None)


_annotations = functools.lru_cache(typing.get_type_hints)


def _may_be_a_path(hint: Any) -> bool:
    """Whether an argument of this annotation may be a path, so that what it is for is I/O."""
    return os.PathLike in (typing.get_origin(hint), *map(typing.get_origin, typing.get_args(hint)))


@contextlib.contextmanager
def _no_more_than(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Ends constructors in this thread that make far more than a file has tensors for: a depth of 10⁹ has no end."""
    elements = SPARE_ELEMENTS + 2 * sum(tensor.numel() for tensor in tensors.values())
    things, thread = SPARE_PARTS + 40 * len(tensors), threading.get_ident()

    def count(module: nn.Module, name: str, thing: Any) -> None:
        nonlocal elements, things
        if threading.get_ident() == thread and thing is not None:
            things -= 1
            elements -= thing.numel() if isinstance(thing, Tensor) else 0
            if things < 0 or elements < 0:
                raise _DescriptionError(TOO_LARGE)

    with contextlib.ExitStack() as hooks:
        for register in (
            registration.register_module_parameter_registration_hook,
            registration.register_module_buffer_registration_hook,
            registration.register_module_module_registration_hook,
        ):
            hooks.callback(register(count).remove)
        yield


def check_sizes(make: Callable[[], Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a description whose tensors are not those of the file, before any memory is taken for them.

    Args:
        make: Makes the module; called on the device "meta", where tensors have sizes and no values.
        tensors: The tensors of the file.

    Raises:
        ValueError: If they differ.
    """
    try:
        with RandomSource(0).everywhere(), _no_more_than(tensors), torch.device("meta"):
            model = make()
    except _DescriptionError as error:
        if "meta tensor" in str(error.__cause__):  # a network that cannot be built there
            return
        raise
    if not isinstance(model, nn.Module):
        raise _DescriptionError(f"it describes a {type(model).__name__}, not a model.")
    _compare(model, tensors)


def _check_finite(model: nn.Module, saving: bool = True) -> None:
    """Refuse weights, and numbers of this library's modules, that are not finite; and NaN in those of others."""
    for prefix, module in model.named_modules():
        for named, ours in ((module.named_parameters, True), (module.named_buffers, type(module) in KNOWN_CLASSES)):
            for key, tensor in named(recurse=False):
                if tensor.is_floating_point() and bool((~tensor.isfinite() if ours else tensor.isnan()).any()):
                    place = f"{prefix}.{key}" if prefix else key
                    text = f"{place!r} has values that are not finite, such as NaN."
                    raise CheckpointError(f"Cannot save: {text}") if saving else _DescriptionError(text)


def _compare(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of the model; buffers of modules that are not ours may have another size."""
    names = set(model.state_dict())
    if missing := sorted(names - set(tensors) - _newer_buffers(model)):
        raise _DescriptionError(
            f"it has no tensor {missing[0]!r} (and {len(missing) - 1} others) that the model needs."
        )
    if unexpected := sorted(set(tensors) - names):
        raise _DescriptionError(
            f"its tensor {unexpected[0]!r} (and {len(unexpected) - 1} others) is not part of the model."
        )
    for prefix, module in model.named_modules():
        places = dict(module.named_parameters(recurse=False))
        if type(module) in KNOWN_CLASSES:
            places |= dict(module.named_buffers(recurse=False))
        for key, tensor in places.items():
            name = f"{prefix}.{key}" if prefix else key
            if name not in names or name not in tensors:  # a buffer that is not stored, or was not in earlier versions
                continue
            mine, stored = (f"shape {tuple(one.shape)}" for one in (tensor, tensors[name]))
            both = {tensor.dtype, tensors[name].dtype}
            if mine == stored and len(both) > 1 and not both <= FLOATS:  # floats may be of another precision
                mine, stored = f"type {tensor.dtype}", f"type {tensors[name].dtype}"
            if mine != stored:
                raise _DescriptionError(f"{name!r} has {stored} in the file, but {mine.split(' ', 1)[1]} in the model.")


def _newer_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that files of earlier versions do not have; there they keep their values of the start."""
    modules = ((prefix, getattr(module, "newer_buffers", ())) for prefix, module in model.named_modules())
    return {f"{prefix}.{key}" if prefix else key for prefix, keys in modules for key in keys}


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the tensors, with their dtypes."""
    make_trainable(model)
    _compare(model, tensors)
    state = model.state_dict()
    tensors = {name: state[name] for name in _newer_buffers(model) - set(tensors)} | tensors
    dtypes = {tensors[name].dtype for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    if len(dtypes) == 1:
        # As the caller did once; this reaches the buffers that are not stored, too.
        model.to(dtypes.pop())
    for name, parameter in model.named_parameters():
        if parameter.dtype != tensors[name].dtype:
            parameter.data = parameter.data.to(tensors[name].dtype)
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            stored = tensors.get(f"{prefix}.{key}" if prefix else key)
            if stored is not None and (buffer.shape, buffer.dtype) != (stored.shape, stored.dtype):
                setattr(module, key, torch.empty_like(stored, device=buffer.device))
    model.load_state_dict(tensors)
    _check_finite(model, saving=False)


# ---------------------------------------------------------------------------------------------- files
