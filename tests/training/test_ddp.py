"""Two gloo processes train as one process does on the same global batches.

Every batch is shared out over the processes, the objective draws the same nodes in each, and DDP averages gradients: in
exact arithmetic nothing differs. In float64 the losses agree to 1e-12 nats, and the weights to
1e-7. The weights less than the losses, because AdamW blows up the rounding of gradients that are zero in exact
arithmetic (that of a constant added to f, which Z takes back). In float32 this reaches the size of a step, so there
only losses and densities are compared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import energyreg as er
from energyreg.densities.bases import ProposalBase
from energyreg.networks.encoders import TableEncoder
from energyreg.networks.heads import SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork
from energyreg.objectives import ExactMaximumLikelihood, ProposalNLL

N = 203


def table() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(N, 2, generator=generator)
    return x, x[:, 0] + 0.1 * torch.randn(N, generator=generator)


def energy() -> er.EnergyRegressionModel:
    torch.manual_seed(0)
    return er.EnergyRegressionModel.for_table(2, width=8, dropout=0.0)


def with_idle_head() -> er.EnergyRegressionModel:
    torch.manual_seed(0)
    encoder, proposal = TableEncoder(2, 8, dropout=0.0), MixtureDensityNetwork(8)
    return er.EnergyRegressionModel(encoder, SeparableHead(8), proposal=proposal, base=ProposalBase())


X, Y = table()
EXACT = {
    "objective": ExactMaximumLikelihood(32),
    "epochs": 3,
    "batch_size": 50,
    "learning_rate": 0.01,
    "precision": "64-true",
}
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "exact": (energy, {}),
    "exact, float32": (energy, {"precision": "32-true"}),
    "one batch an epoch": (energy, {"batch_size": 1000, "validation": None, "epochs": 6}),
    "odd batch": (energy, {"batch_size": 33}),
    "weights": (energy, {"sample_weight": torch.arange(N) % 4}),
    "unused head": (with_idle_head, {"objective": ProposalNLL()}),
    "validation loader": (energy, {"validation": DataLoader(TensorDataset(X, Y), batch_size=20, shuffle=True)}),
}


def outcome(model: er.EnergyRegressionModel, history: er.History) -> dict[str, Any]:
    state = {name: tensor.double().tolist() for name, tensor in model.state_dict().items()}
    return {"history": history.to_dict(), "weights": state, "log_prob": model(X).log_prob(Y).tolist()}


def train(name: str, **settings: Any) -> dict[str, Any]:
    make, own = RUNS[name]
    model = make()
    return outcome(model, er.fit(model, X, Y, **{**EXACT, **own, **settings}))


def refused(**settings: Any) -> str:
    try:
        er.fit(energy(), **{**EXACT, **settings})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    rank, two = os.environ["RANK"], {"accelerator": "cpu", "devices": 2}
    results = {name: train(name, **two) for name in RUNS}
    results["again"] = train("exact", **two)
    results["resumed"] = {}
    checkpoints = folder / "checkpoints"
    er.fit(energy(), X, Y, **EXACT, **two, checkpoint_dir=checkpoints)
    model = energy()
    results["resumed"] = outcome(model, er.fit(model, X, Y, **EXACT, **two, checkpoint_dir=checkpoints, resume=True))
    model = energy()
    loader = DataLoader(TensorDataset(X, Y), batch_size=25, shuffle=True)
    results["loader"] = outcome(model, er.fit(model, loader, **{**EXACT, **two, "validation": (X, Y)}))

    def nan(f: Any, q: Any, z: Tensor, *, generator: torch.Generator) -> Any:
        loss = ExactMaximumLikelihood(32)(f, q, z, generator=generator)
        return loss._replace(per_example=loss.per_example * (float("nan") if rank == "1" else 1.0))

    results["errors"] = {
        "nan in one process": refused(x=X, y=Y, objective=nan, **two),
        "other data": refused(x=X, y=Y + float(rank), **two),
        "one row each": refused(x=X, y=Y, batch_size=1, **two),
        "other processes": refused(x=X, y=Y, accelerator="cpu", devices=3),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        __file__,
        str(folder),
    ]
    paths = [str(Path(er.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    results[0]["output"] = done.stdout + done.stderr
    return results


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name: str, two: list[dict[str, Any]]) -> None:
    single = "float32" in name
    one, both = train(name), two[0][name]
    for quantity in ("train_loss", "validation_nll", "learning_rate"):
        tolerance = 1e-5 if single else 1e-12
        assert both["history"][quantity] == pytest.approx(one["history"][quantity], abs=tolerance), quantity
    assert both["log_prob"] == pytest.approx(one["log_prob"], abs=1e-3 if single else 1e-9)
    if single:
        return
    for key, values in one["history"]["diagnostics"].items():
        assert both["history"]["diagnostics"][key] == pytest.approx(values, abs=1e-7), key
    for key, values in one["weights"].items():
        difference = torch.tensor(values, dtype=torch.double) - torch.tensor(both["weights"][key], dtype=torch.double)
        assert float(difference.abs().max()) <= 1e-7, key


def test_processes_have_the_same_weights(two: list[dict[str, Any]]) -> None:
    for name in (*RUNS, "loader", "resumed"):
        assert two[0][name]["weights"] == two[1][name]["weights"], name
        for quantity in ("train_loss", "validation_nll", "best_epoch"):
            assert two[0][name]["history"][quantity] == two[1][name]["history"][quantity], name


def test_two_processes_are_reproducible_and_resume(two: list[dict[str, Any]]) -> None:
    assert two[0]["again"]["weights"] == two[0]["exact"]["weights"] == two[0]["resumed"]["weights"]


def test_unused_parameters_stay(two: list[dict[str, Any]]) -> None:
    for name, tensor in with_idle_head().state_dict().items():
        if name.startswith("head."):
            assert two[0]["unused head"]["weights"][name] == tensor.double().tolist()


def test_loader_is_shared_out(two: list[dict[str, Any]]) -> None:
    losses = two[0]["loader"]["history"]["train_loss"]
    assert losses[-1] < losses[0]


def test_failures_reach_every_process(two: list[dict[str, Any]]) -> None:
    first, second = (result["errors"] for result in two)
    for errors in (first, second):
        assert errors["nan in one process"].startswith(
            "TrainingError: Training stopped: the loss is nan in epoch 1, batch 1"
        )
        assert "which 2 processes cannot share" in errors["one row each"]
        assert "The processes were given different data" in errors["other data"]
        assert "3" in errors["other processes"]
    assert "the values are others" in second["other data"]
    assert "Affected in process 1: loss of 25 of 25" in second["nan in one process"]


def test_processes_are_quiet(two: list[dict[str, Any]]) -> None:
    assert "distributed" not in two[0]["output"].lower()
    assert "Warning" not in two[0]["output"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_fork"])
def test_processes_that_fabric_starts(strategy: str, tmp_path: Path) -> None:
    """The same without torchrun: the script starts itself again, or a copy of the model is trained and comes back."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import json, os, test_ddp\n"
        "if __name__ == '__main__':\n"
        f"    result = test_ddp.train('exact', accelerator='cpu', devices=2, strategy={strategy!r})\n"
        "    if os.environ.get('LOCAL_RANK', '0') == '0':\n"
        "        print(json.dumps(result))\n"
    )
    paths = [str(Path(er.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    both, one = json.loads(done.stdout.splitlines()[-1]), train("exact")
    assert both["history"]["train_loss"] == pytest.approx(one["history"]["train_loss"], abs=1e-12)
    assert both["log_prob"] == pytest.approx(one["log_prob"], abs=1e-9)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
