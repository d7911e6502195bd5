"""`import energyreg` needs torch and NumPy only, and costs little more than torch's own import."""

import json
import subprocess
import sys

LIMIT = 0.2
"""Seconds that `import energyreg` may take where torch and NumPy are imported already."""

MEASURE = """
import json, sys, time
import numpy, torch
before = set(sys.modules)
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([seconds, sorted(new - set(sys.stdlib_module_names))]))
"""


def measure(statement: str) -> tuple[float, set[str]]:
    """Run the statement in a new interpreter where torch is loaded: its seconds, and the new top-level packages."""
    command = [sys.executable, "-c", MEASURE.format(statement=statement)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, packages = json.loads(result.stdout)
    return seconds, set(packages)


def quickest(statement: str, limit: float, attempts: int = 3) -> float:
    """Return the least time of up to three runs; a busy machine can only make an import slower."""
    best = float("inf")
    for _ in range(attempts):
        best = min(best, measure(statement)[0])
        if best < limit:
            break
    return best


def test_import_loads_nothing_beyond_torch_and_numpy() -> None:
    assert measure("import energyreg")[1] - {"torch", "numpy"} == {"energyreg"}


def test_import_is_quick() -> None:
    assert quickest("import energyreg", LIMIT) < LIMIT


def test_a_heavy_import_is_seen() -> None:
    seconds, packages = measure(f"import energyreg, rich; time.sleep({LIMIT})")
    assert "rich" in packages
    assert seconds > LIMIT
