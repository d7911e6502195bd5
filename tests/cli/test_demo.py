"""The demo runs from end to end, and its files hold what it printed."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from energyreg.cli import demo

typer_testing = pytest.importorskip("typer.testing")

pytest.importorskip("matplotlib")
pytest.importorskip("scoringrules")

TINY = demo.Setting(width=16, num_components=2, epochs=1, max_rows=300)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(demo, "QUICK", TINY)
    monkeypatch.setattr(demo, "FULL", (TINY,))


def run(*arguments, status=0):
    from energyreg.cli.app import app

    result = typer_testing.CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == status, result.output
    return result


def test_demo_writes_page_and_results(tiny, tmp_path):
    printed = run("--output", str(tmp_path / "out"), "--seed", "3").stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "results.json"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results.keys() >= {"command", "seed", "setting", "data", "machine", "versions", "models", "seconds"}
    assert results["seed"] == 3 and results["setting"]["width"] == 16
    assert results["data"]["rows"] == {"train": 300, "validation": 300, "test": 300}
    assert results["machine"]["threads"] == 1
    assert results["versions"].keys() >= {"python", "energyreg", "torch", "numpy", "lightning-fabric"}
    assert list(results["models"]) == [demo.GAUSSIAN, demo.MIXTURE, demo.ENERGY]
    page = (tmp_path / "out" / "report.html").read_text()
    for name, model in results["models"].items():
        assert model["scores"].keys() >= {score.key for score in demo.SCORES}
        assert all(math.isfinite(value) for value in model["scores"].values())
        assert len(model["history"]["validation_nll"]) == len(model["history"]["train_loss"]) == 1
        assert f"{model['scores']['nll']:.3f}" in printed and f"{model['scores']['nll']:.3f}" in page
        assert name in page
    # The lines that made it, and where the data are from.
    assert "make.for_table(num_features, real" in page.replace("</span>", "").replace('<span class="number">', "")
    assert "CC BY 4.0" in page


def test_full_run_prints_the_table_of_the_readme(tiny, tmp_path):
    printed = run("--full", "--seeds", "2", "--output", str(tmp_path)).stdout
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4  # heading, rule, four models
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert all(" ± " in line for line in lines[2:])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["seed"] for run in results["runs"]] == [0] * 4 + [1] * 4


def test_summary_says_who_won(monkeypatch):
    def run(nll):
        return demo.Run(None, None, {"nll": nll}, None)

    data = replace(demo.load(TINY))
    results = {"nll_difference": {demo.MIXTURE: {"mean": 0.1, "stderr": 0.01}}}
    won = {demo.GAUSSIAN: run(2.0), demo.MIXTURE: run(1.5), demo.ENERGY: run(1.4)}
    assert "The energy-based model predicts best" in demo.summarise(won, data, results)[1]
    assert "0.100 ± 0.010 nats over the mixture density network" in demo.summarise(won, data, results)[1]
    lost = won | {demo.ENERGY: run(1.6)}
    assert "the mixture density network is best" in demo.summarise(lost, data, results)[1]


def test_examples_are_chosen_by_rule(tiny):
    data = demo.load(TINY)
    torch.manual_seed(0)
    model = demo.build_models(data.x.shape[1], TINY)[demo.ENERGY]
    model.fit_preprocessing(data.x[data.train], data.y[data.train])
    p, y = model.eval()(data.x[data.test]), data.y[data.test]
    rows, examples = demo.choose_examples(p, y)
    assert len(set(rows)) == len(rows) == len(examples) >= 2
    np.testing.assert_array_equal([example.y for example in examples], y[rows, 0])
    assert rows[-1] == int(p.log_prob(y).argmin()) or "Most surprising" not in [e.title for e in examples]
    assert demo.choose_examples(p, y)[0] == rows


def test_the_two_modes_of_a_known_density():
    class TwoUniforms:
        """30% on (0, 1) and 70% on (4, 5), for three rows."""

        def cdf(self, y):
            return (0.3 * y.clamp(0, 1) + 0.7 * (y - 4).clamp(0, 1))[..., 0]

    both = torch.tensor([[0.0, 1.0], [4.0, 5.0]])
    pairs = demo.two_modes(TwoUniforms(), [both, both[:1], both])
    assert list(pairs) == [0, 2]
    assert pairs[2] == demo.TwoModes(*(pytest.approx(v) for v in (0.3, 0.7, 1.0, 1.0, 3.0)))
    assert pairs[2].unlike(0.3) < pairs[2].unlike(0.5)
    assert demo.two_modes(TwoUniforms(), [both[:1]] * 3) == {}


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--seeds", "0"], ["--threads", "0"], ["--seed", "x"]])
def test_bad_arguments_are_refused(arguments):
    assert arguments[0] in run(*arguments, status=2).stderr


def test_output_that_cannot_be_written_is_found_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run_quick", lambda *a: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    assert "file" in run("--output", str(tmp_path / "file"), status=1).stderr


def test_interrupt_ends_quietly(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_quick", interrupted)
    assert "Stopped" in run("--output", str(tmp_path), status=130).stderr


def test_interrupted_training_ends_the_demo(monkeypatch):
    class History:
        interrupted = True

    monkeypatch.setattr(demo, "train", lambda *a: History())
    with pytest.raises(KeyboardInterrupt):
        demo.run_model(None, None, TINY, 0)
