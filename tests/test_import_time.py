"""`import energyreg` costs next to nothing; its core needs torch and NumPy only, and little more than their time."""

import json
import subprocess
import sys

LIMIT = 0.2
"""Seconds that `import energyreg` may take where torch and NumPy are imported already.

Of processor time: the clock's on an idle machine, and without the waiting for other processes on a busy one.
"""

IMPORT = "from energyreg import EnergyRegressionModel, fit, fit_ensemble, load"
"""The package alone imports nothing at all."""

MEASURE = """
import json, sys, time
import numpy, torch
before = set(sys.modules)
start = time.process_time()
{statement}
seconds = time.process_time() - start
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([seconds, sorted(new - set(sys.stdlib_module_names))]))
"""


def measure(statement: str) -> tuple[float, set[str]]:
    """Run the statement in a new interpreter where torch is loaded: its seconds, and the new top-level packages."""
    command = [sys.executable, "-c", MEASURE.format(statement=statement)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, packages = json.loads(result.stdout)
    return seconds, set(packages)


def is_quick(statement: str, attempts: int = 3) -> bool:
    """Whether one of three runs stays below the limit; what disturbs a run can only make it slower."""
    return any(measure(statement)[0] < LIMIT for _ in range(attempts))


def test_import_loads_nothing_beyond_torch_and_numpy() -> None:
    assert measure(IMPORT)[1] - {"torch", "numpy"} == {"energyreg"}


def test_the_package_alone_imports_nothing() -> None:
    code = "import sys, energyreg; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_refine_stays_a_function() -> None:
    code = "import energyreg.refine, energyreg as er; er.EnergyRegressionModel; assert callable(er.refine)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_import_is_quick() -> None:
    assert is_quick(IMPORT)


def test_a_slow_import_and_a_heavy_one_are_seen() -> None:
    assert not is_quick(f"while time.process_time() < start + {LIMIT}: pass", attempts=1)
    assert "rich" in measure("import energyreg, rich")[1]
