"""The benchmarks: plain formulations equal the library, and figures, tables and verdicts say what was measured."""

from __future__ import annotations

import json
import math

import pytest
import torch

import energyreg as er
from energyreg.densities.bases import Lebesgue
from energyreg.densities.noise import GaussianNoise
from energyreg.objectives import losses

pytest.importorskip("matplotlib")  # the experiments need it

from benchmarks import __main__ as command
from benchmarks import plain, roi_pool, startup, steps, table, timing
from benchmarks.rows import Benchmark, Measurement, Options, Skipped
from experiments.one_dimensional.networks import tanh_network

TINY = Options(rounds=2, tiny=True)


# Plain formulations ---------------------------------------------------------------------------------------------------


def test_plain_toy_network_equals_the_split_one() -> None:
    theirs = tanh_network([torch.Generator().manual_seed(0)], fused=False)
    mine = plain.ToyNetwork()
    mine.copy_weights(theirs)
    x, y = torch.randn(5, 1), torch.randn(5, 7)
    values = theirs(theirs.x_branch(x.T[None]))(y.T[..., None])
    torch.testing.assert_close(mine(x, y), values.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 3])
def test_plain_joint_network_equals_the_head(dim: int) -> None:
    torch.manual_seed(0)
    head = er.heads.JointHead(8, dim, width=16)
    torch.nn.init.normal_(head.output.weight)  # zero at the start
    network = plain.JointNetwork(head)
    context, v = torch.randn(5, 8), torch.rand(5, 7, dim) * 2 - 1
    torch.testing.assert_close(network(context, v), head(context, v.transpose(0, 1)).T, rtol=1e-5, atol=1e-5)


def test_plain_gradients_equal_the_heads() -> None:
    torch.manual_seed(1)
    head = er.heads.JointHead(8, width=16)
    torch.nn.init.normal_(head.output.weight)
    network = plain.JointNetwork(head)
    context, v = torch.randn(5, 8), torch.rand(5, 7, 1) * 2 - 1
    head(context, v.transpose(0, 1)).square().sum().backward()
    network(context, v).square().sum().backward()
    first = torch.cat([head.context_map.weight.grad, head.target_map[1].weight.grad], 1)
    torch.testing.assert_close(network.first.weight.grad, first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.output.weight.grad, head.output.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.frequencies.grad, head.target_map[0].frequencies.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 2])
def test_plain_noise_and_loss_equal_the_librarys(dim: int) -> None:
    torch.manual_seed(2)
    y, scales = torch.randn(5, dim), torch.tensor([[0.1], [0.8]]).expand(-1, dim)
    points, density, density_target = plain.sample_noise(y, scales, 64)
    noise = GaussianNoise(scales.tolist())
    log_q = noise.log_prob(points.transpose(0, 1), y)
    torch.testing.assert_close(density.log().expand(5, -1), log_q[1:].T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(density_target.log().expand(5, -1), log_q[:1].T, rtol=1e-4, atol=1e-4)
    f = torch.randn(5, 65)
    expected = losses.nce(f[:, 0], f[:, 1:].T, log_q[0], log_q[1:])
    torch.testing.assert_close(plain.nce_loss(f, density, density_target), expected, rtol=1e-4, atol=1e-4)


def test_plain_coordinates_are_those_of_the_energy_function() -> None:
    """The window is the base of both sides of `joint-wide`, and a constant there: the losses differ by rounding."""
    torch.manual_seed(3)
    model = steps.joint_model(width=16)
    torch.nn.init.normal_(model.head.output.weight)
    x, y = steps.table(64)
    model.fit_preprocessing(x, y)
    model.eval()
    assert isinstance(model.base, Lebesgue)
    f, _, z = model.condition(x, y)
    points, density, density_target = plain.sample_noise(z, torch.tensor([[0.1], [0.8]]), 16)
    g = plain.JointNetwork(model.head)(model.encoder(x), 2 * model.base.to_unit(points) - 1)
    inside = ((points >= model.base.low) & (points <= model.base.high)).all(-1).all(1)
    values = f(points.transpose(0, 1)).T
    constant = (values - g)[inside]
    torch.testing.assert_close(constant, constant[:1, :1].expand_as(constant), rtol=1e-4, atol=1e-4)
    mine = plain.nce_loss(g, density, density_target)[inside]
    torch.testing.assert_close(plain.nce_loss(values, density, density_target)[inside], mine, rtol=1e-3, atol=1e-4)


# Timing ---------------------------------------------------------------------------------------------------------------


def test_ratio_is_the_median_of_pairs() -> None:
    found = timing.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])
    assert (found.low, found.median, found.high) == (2.5, 3.0, 3.5)
    assert timing.ratio([3.0], [2.0]).high == 1.5


def test_growth_recovers_an_exponent() -> None:
    sizes = [8, 16, 32, 64]
    assert timing.growth(sizes, [3e-3 * size**1.7 for size in sizes]) == pytest.approx(1.7)


def test_paired_times_every_action_in_every_round() -> None:
    calls = {"a": 0, "b": 0}

    def count(name: str):
        def action() -> None:
            calls[name] += 1

        return action

    times = timing.paired({name: count(name) for name in calls}, 4, shortest=0.0)
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 4, "b": 4}
    assert calls == {"a": 3 + 1 + 4, "b": 3 + 1 + 4}
    assert times.ratio("a", "b").low <= times.ratio("a", "b").high


def test_matrix_products_of_a_step_are_all_of_them() -> None:
    layer = torch.nn.Linear(3, 5)
    x = torch.randn(7, 3, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()

    products, flops = steps.matrix_products(step)
    products()
    assert flops == 3 * 2 * 7 * 3 * 5  # forward, gradient of the weights, gradient of the input


def test_matrix_products_in_place_and_into_memory_are_counted() -> None:
    a, b, out = torch.randn(4, 6), torch.randn(6, 5), torch.zeros(4, 5)

    def step() -> None:
        torch.mm(a, b, out=out)
        out.addmm_(a, b)

    assert steps.matrix_products(step)[1] == 2 * 2 * 4 * 6 * 5


def test_a_step_without_matrix_products_is_skipped() -> None:
    with pytest.raises(Skipped, match="no matrix products"):
        steps.matrix_products(lambda: torch.ones(3).sum())


def test_import_is_timed_apart_from_torch() -> None:
    (benchmark,) = (row for row in startup.BENCHMARKS if row.name == "import")
    measurement = benchmark.measure(Options(tiny=True))
    assert 0.005 < measurement.value < measurement.seconds["torch"]  # the core itself, not only its name


# Rows, table and guard ------------------------------------------------------------------------------------------------


SETUP = {"processor": "some processor", "cores": 2, "date": "2026-01-01"}


def row(value: float, better: str = "lower", guarded: str = "value", ratio: float | None = None, **other) -> dict:
    bench = Benchmark("separable", "some work", "≤ 1.3 ×", lambda options: None, 1.3, better, guarded=guarded)
    record = bench.record(Measurement(value, (value - 0.1, value + 0.1), ratio, {"a": 0.002}, {"M": 3}), 1, Options())
    return {**record, **SETUP, **other}


@pytest.mark.parametrize(
    ("better", "value", "met"),
    [("lower", 1.2, True), ("lower", 1.4, False), ("higher", 1.4, True), ("higher", 1, False)],
)
def test_a_target_is_met_on_its_side_of_the_limit(better: str, value: float, met: bool) -> None:
    assert row(value, better)["met"] is met


@pytest.mark.parametrize(
    ("better", "before", "after", "worse"),
    [
        ("lower", 1.0, 1.29, False), ("lower", 1.0, 1.31, True), ("lower", 1.0, 0.2, False),
        ("higher", 4.0, 3.1, False), ("higher", 4.0, 3.0, True), ("higher", 4.0, 9.0, False),
    ],
)  # fmt: skip
def test_guard_fails_beyond_thirty_percent(better: str, before: float, after: float, worse: bool) -> None:
    line = table.verdict(row(before, better), row(after, better))
    assert (line is not None) is worse
    if line is not None:
        assert "separable" in line and f"{after:.2f}" in line and f"{before:.2f}" in line


def test_guard_compares_ratios_of_rates_and_nothing_else() -> None:
    rate = {"better": "higher", "guarded": "ratio"}
    assert table.verdict(row(50_000, ratio=1.0, **rate), row(100, ratio=1.1, **rate)) is None
    assert table.verdict(row(50_000, ratio=1.0, **rate), row(50_000, ratio=1.4, **rate)) is not None
    assert table.verdict(row(1.0, guarded="nothing"), row(9.0, guarded="nothing")) is None


def test_guard_says_where_a_ratio_cannot_be_measured_any_more() -> None:
    bench = next(bench for bench in table.BENCHMARKS if bench.name == "separable")
    line = table.verdict(row(1.0), bench.skipped("it is gone", 1, Options()))
    assert line is not None and "it is gone" in line


def test_new_rows_replace_those_of_the_same_name_threads_and_device() -> None:
    old = [row(1.0), row(2.0, threads=2), row(3.0, device="cuda", gpu="some GPU")]
    merged = table.merge(old, [row(5.0)])
    assert [entry["value"] for entry in merged] == [5.0, 2.0, 3.0]


def test_table_shows_figure_target_machine_and_reason(tmp_path) -> None:
    bench = next(bench for bench in table.BENCHMARKS if bench.name == "together")
    skipped = bench.skipped("not there", 1, Options()) | {
        "processor": "some processor",
        "cores": 2,
        "date": "2026-01-01",
    }
    rows = [row(1.5), skipped, row(math.nan, threads=2)]
    table.write(tmp_path, rows)
    text = (tmp_path / "README.md").read_text()
    assert "| `separable` | some work | 1 | ≤ 1.3 × | 1.50 × (1.40 – 1.60) | **no** |" in text
    assert "some processor, 2 cores, PyTorch" in text and "2026-01-01" in text
    assert "skipped: not there" in text and "a 2 ms; M 3." in text
    assert table.read(tmp_path)[0] == json.loads(json.dumps(rows[0]))
    assert table.read(tmp_path)[2]["value"] is None  # JSON has no NaN


def test_quick_leaves_out_what_takes_minutes() -> None:
    names = {bench.name for bench in table.select(None, quick=True)}
    assert "separable" in names and not names & {"protein", "toy1", "demo"}
    assert [bench.name for bench in table.select("prot*,demo", quick=True)] == ["protein", "demo"]
    assert len({bench.name for bench in table.BENCHMARKS}) == len(table.BENCHMARKS)


@pytest.mark.parametrize(
    "name", ["joint-toy", "joint-wide", "limit-separable", "limit-joint", "predict-interval", "load"]
)  # fmt: skip
def test_rows_can_be_measured(name: str) -> None:
    (bench,) = table.select(name)
    with torch.random.fork_rng():
        record = bench.record(bench.measure(TINY), 1, TINY)
    assert math.isfinite(record["value"]) and record["text"]
    json.dumps(record)


def test_poolings_are_compared_with_their_gradients() -> None:
    pytest.importorskip("torchvision")
    with torch.random.fork_rng():
        shapes = {name: [tuple(g.shape) for g in act()] for name, act in roi_pool.actions("wide", True, "cpu").items()}
    maps, boxes = (1, 4, 30, 40), (8, 4)
    assert shapes == {"boxes": [boxes], "boxes and features": [maps, boxes], "RoIAlign, features": [maps]}


def test_the_share_of_the_refinement_is_what_it_adds_to_the_detector() -> None:
    pytest.importorskip("torchvision")
    (benchmark,) = (row for row in table.BENCHMARKS if row.name == "refinement-small-10")
    measurement = benchmark.measure(Options(rounds=1, tiny=True))
    seconds = measurement.seconds
    assert measurement.value == pytest.approx(seconds["refined"] / seconds["detector"] - 1)
    assert "share with a head of width 256" in measurement.details


def test_command_measures_in_a_process_of_its_own_and_writes(tmp_path) -> None:
    options = ["--tiny", "--quick", "--only", "separable", "--threads", "1", "--rounds", "1", "--output", str(tmp_path)]
    assert command.main(options) == 0
    (entry,) = table.read(tmp_path)
    assert entry["name"] == "separable" and entry["threads"] == 1 and entry["quick"]
    assert "`separable`" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("figures", "code"), [([1.1], 0), ([2.0, 1.1], 0), ([2.0, 2.0], 1)])
def test_guard_looks_twice_before_it_fails(figures: list[float], code: int, tmp_path, monkeypatch, capsys) -> None:
    table.write(tmp_path, [row(1.0)])
    left = iter(figures)
    monkeypatch.setattr(command, "measure_each", lambda arguments, threads, only: [row(next(left))])
    assert command.main(["guard", "--output", str(tmp_path)]) == code
    assert next(left, None) is None
    assert ("100 % worse" in capsys.readouterr().out) is bool(code)


def test_guard_without_results_says_so(tmp_path, capsys) -> None:
    assert command.main(["guard", "--output", str(tmp_path)]) == 2
    assert "nothing to compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--threads", "0"], ["--threads", "x"], ["--rounds", "0"], ["--only", "nothing-*"]]
)
def test_wrong_arguments_are_refused(options: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(options)
    assert "error" in capsys.readouterr().err
