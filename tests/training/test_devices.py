"""A training on the processor: as by Fabric, bit for bit, without its import, and in little memory."""

import subprocess
import sys

import numpy as np
import pytest

import energyreg as er
from energyreg.training import devices
from energyreg.training.devices import OneProcessor, make_fabric, needs_fabric
from energyreg.training.settings import TrainingSettings

MEASURE = """
import resource, sys
import torch
torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).zero_grad()  # torch imports much of itself here
import numpy as np, sklearn.base
from energyreg.estimators.table import EnergyRegressor
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rng = np.random.default_rng(0)
X = rng.normal(size=(10_000, 20))
EnergyRegressor(epochs=1, n_members=2, dropout=0.1, frequency_scale=0.5, random_state=0, validation_fraction=0.05).fit(
    X, X[:, 0] + rng.normal(size=10_000))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "lightning_fabric" in sys.modules)
"""


def test_a_fit_takes_little_memory_beside_the_imports() -> None:
    """Encoded rows, weights and one batch of 10,000 rows are some 20 MB; a block of predictions is the rest."""
    answer = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURE], capture_output=True, text=True, check=True)
    megabytes, fabric = answer.stdout.split()
    assert float(megabytes) < 250
    assert fabric == "False"


def test_the_processor_gives_the_bits_of_fabric(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 2)).astype(np.float32)
    results = []
    for name in ("LT_OTHER", "OTHER"):
        monkeypatch.setenv(name, "1")
        model = er.EnergyRegressionModel.for_table(2, width=8)
        model.load_state_dict(results[0][1]) if results else None
        start = {key: value.clone() for key, value in model.state_dict().items()}
        history = er.fit(model, x, x[:, 0], epochs=2, progress=False, seed=3)
        results.append((history.train_loss, start, model.state_dict()))
        monkeypatch.delenv(name)
    assert results[0][0] == results[1][0]
    assert all((value == results[1][2][key]).all() for key, value in results[0][2].items())


@pytest.mark.parametrize(
    ("accelerator", "count", "changes"),
    [("cuda", 1, {}), ("cpu", 2, {}), ("cpu", True, {}), ("cpu", 1, {"precision": "64-true"}),
     ("cpu", 1, {"strategy": "ddp"})],
)  # fmt: skip
def test_all_else_is_left_to_fabric(accelerator: str, count: int, changes: dict[str, str]) -> None:
    assert needs_fabric(accelerator, count, TrainingSettings(**changes))
    assert not isinstance(make_fabric("cpu", 1, TrainingSettings(), in_memory=False), OneProcessor)
    assert isinstance(make_fabric("cpu", 1, TrainingSettings()), devices.OneProcessor)
