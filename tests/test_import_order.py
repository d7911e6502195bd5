"""Imports inside the package go one way: from a layer to the layers below it, never up and never sideways."""

import ast
from collections.abc import Iterator
from pathlib import Path
from sys import stdlib_module_names

import pytest

import energyreg

PACKAGE = "energyreg"
SOURCE = Path(energyreg.__file__).parent

# Low to high. A module may import from the rows above its own. A new module gets its place here first.
LAYERS = [
    {"losses", "spaces", "points", "augment"},
    {"bases", "proposals", "heads", "encoders", "image_encoders"},
    {"energy", "noise"},
    {"integrators", "mcmc", "refine"},
    {"objectives"},
    {"predictive"},
    {"model"},
    {"ensemble", "export"},
    {"chain"},
    {"checkpoint", "metrics"},
    {"plots"},
    {"training"},
    {"ensemble_training"},
    {"chain_training"},
    {"report"},
    {"tables", "calibration", "tablefiles"},
    {"blocks", "images"},
    {"estimator"},
    {"evaluation", "skpro", "image_estimator"},
    {"table_report"},
    {"vision"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
# Stands on the side: files on disk to arrays, knowing nothing of the models, used by the top only.
ASIDE = "datasets"
# From here on modules may use the package as its users do.
TOP = "demo"
# What a module may import while it is itself imported; anything else waits inside the function that uses it.
EAGER = {*stdlib_module_names, "torch", "numpy", PACKAGE}
# A class needs its bases while it is made, a command its options; the package imports these only when asked for them.
BASES = {"estimator": {"sklearn"}, "skpro": {"skpro"}, "cli": {"typer"}}


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the absolute name of everything that is imported, at any depth: `a.b` for `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = module.split(".")
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


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return what the module imports and may not, one line each; `module` is its absolute name."""
    tree = ast.parse(source)
    eager = eager_statements(tree)
    name = module.removeprefix(PACKAGE).removeprefix(".").split(".")[0]
    if name and name != ASIDE and name not in LEVEL:
        return [f"{module} has no layer: give it one in LAYERS of tests/test_import_order.py"]
    found = []
    for target, node in imports(tree, module, is_package):
        where = f"{module}, line {node.lineno}: {target}"
        root, *rest = target.split(".")
        if root not in EAGER | BASES.get(name, set()) and node in eager:
            found.append(f"{where} is imported eagerly: move the import into the function that uses it")
        if root != PACKAGE or not name:  # energyreg/__init__.py itself stands on top of everything
            continue
        imported = rest[0] if rest else ""
        if imported == name:
            continue
        if name == ASIDE:
            found.append(f"{where}: {ASIDE} stands on the side and imports nothing of {PACKAGE}")
        elif imported in LEVEL and LEVEL[imported] >= LEVEL[name]:
            found.append(f"{where}: {imported} is not below {name}")
        elif imported not in LEVEL and LEVEL[name] < LEVEL[TOP]:
            found.append(f"{where}: only {TOP} and what is above it import the package itself or {ASIDE}")
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_the_layers(path: Path) -> None:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert violations(path.read_text(encoding="utf-8"), module, is_package) == []


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from energyreg.model import EnergyRegressionModel", "energyreg.heads", "model is not below heads"),
        ("from energyreg import model", "energyreg.heads", "model is not below heads"),
        ("from . import model", "energyreg.heads", "model is not below heads"),
        ("from .model import EnergyRegressionModel", "energyreg.heads", "model is not below heads"),
        ("import energyreg.bases", "energyreg.heads", "bases is not below heads"),
        ("def f():\n    from energyreg.training import fit", "energyreg.model", "training is not below model"),
        ("import energyreg as er", "energyreg.model", "import the package itself"),
        ("from energyreg import fit", "energyreg.report", "import the package itself"),
        ("from ..spaces import Real", "energyreg.datasets.protein", "stands on the side"),
        ("from energyreg.datasets import load_protein", "energyreg.training", "import the package itself"),
        ("", "energyreg.helpers", "has no layer"),
        ("try:\n    import pandas\nexcept ImportError:\n    pass", "energyreg.training", "imported eagerly"),
        ("class A:\n    import rich", "energyreg.training", "imported eagerly"),
        ("import safetensors.torch", "energyreg", "imported eagerly"),
    ],
)
def test_a_violation_is_found(source: str, module: str, expected: str) -> None:
    assert [expected in line for line in violations(source, module, is_package=module == PACKAGE)] == [True]


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import math\nimport torch\nfrom torch import nn\nfrom energyreg.spaces import Real", "energyreg.model"),
        ("def f():\n    import pandas", "energyreg.training"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas", "energyreg.training"),
        ("import energyreg as er\nfrom energyreg.datasets import load_protein", "energyreg.demo"),
        ("from .protein import load_protein", "energyreg.datasets"),
        ("from energyreg.model import EnergyRegressionModel", "energyreg"),
    ],
)
def test_what_is_allowed_is_not_found(source: str, module: str) -> None:
    assert violations(source, module, is_package=module in (PACKAGE, f"{PACKAGE}.datasets")) == []
