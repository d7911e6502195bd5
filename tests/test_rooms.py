"""The rooms of the package: imports go one way, by one row a room, and no private name crosses a file."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from sys import stdlib_module_names

import pytest

import energyreg

PACKAGE = "energyreg"
SOURCE = Path(energyreg.__file__).parent

# A room may import from itself, from the rooms of its row, and from whatever those may import. A new file in one of
# these folders needs no entry; a new folder gets its row first.
ROOMS: dict[str, set[str]] = {
    "ground": set(),  # the files beside the folders
    "datasets": set(),  # files on disk to arrays, which know nothing of models
    "plots": {"ground"},  # figures of numbers and of whatever has the methods of a distribution; they know no model
    "densities": {"ground"},
    "inference": {"densities"},
    "networks": {"densities"},
    "objectives": {"inference"},
    "models": {"networks", "objectives"},
    "training": {"models", "plots"},
    "tables": {"ground"},
    "images": {"tables"},
    "estimators": {"training", "images"},
    "scoring": {"estimators"},
    "evaluation": {"estimators"},
    "reports": {"evaluation", "images", "plots"},
    "vision.boxes": {"training"},
    "vision.pooling": {"ground"},
    "vision.detection": {"vision.boxes", "vision.pooling", "images"},
    "vision": {"vision.detection"},
    "cli": {"reports", "scoring", "vision", "datasets"},
}
# What a module may import while it is itself imported; anything else waits inside the function that uses it.
EAGER = {*stdlib_module_names, "torch", "numpy", PACKAGE}
# A class needs its bases while it is made, a command its options; the package imports these only when asked for them.
BASES = {"estimators.core": {"sklearn"}, "estimators.table": {"sklearn"}, "estimators.image": {"sklearn"},
         "estimators.skpro": {"skpro"}, "cli": {"typer"}}  # fmt: skip
# Other libraries' names with an underscore, which have no public twin.
BORROWED = {
    "_BatchNorm",  # torch.nn.modules.batchnorm: the parent of all batch normalisations
    "_are_functorch_transforms_active",  # torch._C
    "_C",  # torch._C
    "_pop_mode",  # torch.utils: the stack of dispatch modes of a thread
    "_push_mode",  # the same
    "_overloadname",  # torch.ops: "default", "low", ...
    "_schema",  # torch.ops: the arguments of an operation
    "_foreach_lerp_",  # torch: one kernel over many tensors
    "_get_columns",  # skpro's estimators
    "_remove_worker_pids",  # torch._C
    "_shutdown_workers",  # torch's DataLoader
}
LONGEST_FILE = 620
LONGEST_CLASS = 400


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    """A module's name below the package: `models.chain`, and `models` for its `__init__`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module by its name below the package."""
    parts = module.split(".")
    return next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in ROOMS), "ground")


def below(room: str) -> set[str]:
    """A room, and all that it may import."""
    return {room}.union(*(below(other) for other in ROOMS[room]))


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the absolute name of everything that is imported, at any depth: `a.b` for `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = f"{PACKAGE}.{module}".split(".")
                parent = parts[: len(parts) - node.level + is_package]
                origin = ".".join([*parent, origin] if origin else parent)
            yield from ((f"{origin}.{alias.name}", node) for alias in node.names)


def eager_statements(tree: ast.Module) -> set[ast.stmt]:
    """Return the statements that run at import: not in a function, nor under `if TYPE_CHECKING`."""
    found: set[ast.stmt] = set()

    def walk(statements: list[ast.stmt]) -> None:
        for node in statements:
            found.add(node)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                walk(node.orelse)
                continue
            for field in ("body", "orelse", "finalbody"):
                walk(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                walk(handler.body)

    walk(tree.body)
    return found


def private_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield names with one underscore that a file uses and does not define itself, with their lines."""
    own: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                own.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                own.add(name)
    for node in ast.walk(tree):
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names = [alias.name for alias in node.names]
        for name in names:
            imported = isinstance(node, ast.ImportFrom)
            if name.startswith("_") and not name.startswith("__") and (imported or name not in own):
                yield name, node.lineno


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return what the module imports or uses and may not, one line each; `module` is its name below the package."""
    tree = ast.parse(source)
    eager, room = eager_statements(tree), room_of(module)
    allowed = below(room)
    found = [
        f"{module}, line {line}: {name} is private to another file"
        for name, line in private_names(tree)
        if name not in BORROWED
    ]
    if room == "ground" and "." in module:
        return [f"{module} is in a folder without a row in ROOMS of tests/test_rooms.py"]
    for target, node in imports(tree, module, is_package):
        where = f"{module}, line {node.lineno}: {target}"
        root, *rest = target.split(".")
        if root not in EAGER | BASES.get(module, BASES.get(room, set())) and node in eager:
            found.append(f"{where} is imported eagerly: move the import into the function that uses it")
        if root != PACKAGE or module in ("", "__main__"):  # these stand on top of everything
            continue
        inside = ".".join(rest)
        if not rest or not any((SOURCE / place).exists() for place in (f"{rest[0]}.py", rest[0])):
            if rest != ["__version__"] and "cli" not in allowed:
                found.append(f"{where}: only cli imports the package as its users do")
        elif room_of(inside) not in allowed:
            found.append(f"{where}: {room_of(inside)} is not below {room}")
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_go_down_and_private_names_stay(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert violations(source, name_of(path), path.name == "__init__.py") == []


def test_rooms_have_no_circle() -> None:
    assert next(iter(TopologicalSorter(ROOMS).static_order())) in ("ground", "datasets")
    with pytest.raises(CycleError):
        list(TopologicalSorter({**ROOMS, "ground": {"cli"}}).static_order())


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_files_and_classes_are_of_a_size_to_read(path: Path) -> None:
    """A class beyond the limit says in its docstring, after the word "Long:", why it is one."""
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= LONGEST_CLASS:
            assert "Long: " in (ast.get_docstring(node) or ""), f"{node.name} has {node.end_lineno - node.lineno} lines"


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from energyreg.models.model import EnergyRegressionModel", "networks.heads", "models is not below networks"),
        ("from ..models import model", "networks.heads", "models is not below networks"),
        ("def f():\n    from energyreg.training import fit", "models.model", "training is not below models"),
        ("from energyreg.inference import ascent", "networks.heads", "inference is not below networks"),
        ("from energyreg.vision.detection import detector", "vision.boxes.energy", "is not below vision.boxes"),
        ("from energyreg import fit", "reports.page", "import"),
        ("from ..spaces import Real", "datasets.protein", "import"),
        ("from energyreg.datasets import load_protein", "training.loop", "datasets is not below training"),
        ("", "helpers.strings", "without a row"),
        ("try:\n    import pandas\nexcept ImportError:\n    pass", "training.loop", "imported eagerly"),
        ("class A:\n    import rich", "training.loop", "imported eagerly"),
        ("import safetensors.torch", "files", "imported eagerly"),
        ("def f(p):\n    return p._energy", "models.chain", "_energy is private"),
        ("class A(B):\n    def f(self):\n        return self._parts", "models.chain", "_parts is private"),
        ("from energyreg.models.model import _array", "models.chain", "_array is private"),
    ],
)
def test_a_violation_is_found(source: str, module: str, expected: str) -> None:
    assert [expected in line for line in violations(source, module)] == [True]


@pytest.mark.parametrize(
    ("source", "module"),
    [
        (
            "import math\nimport torch\nfrom torch import nn\nfrom energyreg.densities.spaces import Real",
            "models.model",
        ),
        ("def f():\n    import pandas", "training.loop"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas", "training.loop"),
        ("import energyreg as er\nfrom energyreg.datasets import load_protein", "cli.demo"),
        ("from .protein import load_protein", "datasets"),
        ("from energyreg.models.model import EnergyRegressionModel", ""),
        (
            "class A:\n    def __init__(self):\n        self._x = 1\n    def f(self, other):\n        return other._x",
            "files",
        ),
    ],
)
def test_what_is_allowed_is_not_found(source: str, module: str) -> None:
    assert violations(source, module, is_package=module in ("", "datasets")) == []
