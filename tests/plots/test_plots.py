"""Figures show what they were given, follow the user's settings, and leave Matplotlib's global state alone."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import energyreg as er
from energyreg import plots

matplotlib = pytest.importorskip("matplotlib")

ROWS = 40


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 2, generator=generator)
    y = x[:, :1] + 0.3 * torch.randn(ROWS, 1, generator=generator)
    return x, y


@pytest.fixture(scope="module")
def models(data):
    x, y = data
    torch.manual_seed(0)
    models = {
        "mixture": er.EnergyRegressionModel.mixture_for_table(2, num_components=3, width=8),
        "energy": er.EnergyRegressionModel.for_table(2, width=8),
    }
    for model in models.values():
        model.fit_preprocessing(x, y)
        model.eval()
    return {name: model(x) for name, model in models.items()}


def histories():
    return {
        "mixture": SimpleNamespace(validation_nll=[9.0, 2.0, 1.5, 1.6], train_loss=[1.0, 0.5, 0.2, 0.1]),
        "energy": SimpleNamespace(validation_nll=[8.0, 1.9, 1.4, 1.3], train_loss=[1.1, 0.6, 0.3, 0.2]),
    }


def diagnostics(rows=ROWS, **changes):
    spread = torch.linspace(-1, 1, rows)
    values = er.predictive.Diagnostics(spread, torch.full((rows,), 0.01), 100 + spread, 0.5 + 0.4 * spread, 512)
    return replace(values, **changes)


def angles():
    torch.manual_seed(0)
    model = er.EnergyRegressionModel.for_table(2, er.spaces.Circle(360.0), width=8)
    x, y = torch.randn(30, 2), 360 * torch.rand(30, 1)
    model.fit_preprocessing(x, y)
    return model.eval()(x[:2])


def pit(rows=500):
    return torch.rand(rows, generator=torch.Generator().manual_seed(1))


def draw(figure):
    """Draw it in full, as an image and as SVG: some mistakes show only then."""
    figure.savefig(io.BytesIO(), format="png")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def lines_of(figure):
    return [line for ax in figure.axes for line in ax.lines]


FIGURES = {
    "densities_of_one": lambda models, y: plots.densities(models["energy"], y),
    "densities": lambda models, y: plots.densities(models, y, rows=[0, 3], titles=["first", "second"], label="y (m)"),
    "pit_histogram": lambda models, y: plots.pit_histogram(pit(), title="energy"),
    "coverage_curve": lambda models, y: plots.coverage_curve({"mixture": pit(), "energy": pit(300)}),
    "coverage_gap": lambda models, y: plots.coverage_curve({"mixture": pit(), "energy": pit(300)}, gap=True),
    "learning_curves": lambda models, y: plots.learning_curves(histories()),
    "log_partition": lambda models, y: plots.log_partition(diagnostics()),
    "log_partition_difference": lambda models, y: plots.log_partition(diagnostics(), reference=torch.zeros(ROWS)),
    "densities_on_a_circle": lambda models, y: plots.densities({"a": angles()}, [350.0, 10.0], circle=(0.0, 360.0)),
    "reliability_curve": lambda models, y: plots.reliability_curve({"a": pit(), "b": pit() ** 2}),
    "sharpness": lambda models, y: plots.sharpness({"a": 1 + pit(), "b": pit()}),
    "probabilities": lambda models, y: plots.probabilities([0, 1, 2], [0.5, 0.3, 0.2], 1),
    "joint_draws_of_two": lambda models, y: plots.joint_draws(np.zeros((5, 2)), [0, 1], labels=["u", "v"]),
    "joint_draws_of_three": lambda models, y: plots.joint_draws(np.eye(3), [0, 1, 2], labels=["u", "v", "w"]),
    "histogram": lambda models, y: plots.histogram(y),
    "log_partition_of_a_model": lambda models, y: plots.log_partition(models["energy"].diagnostics),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_without_touching_global_state(name, models, data):
    before = dict(matplotlib.rcParams)
    figure = FIGURES[name](models, data[1])
    assert "<svg" in draw(figure)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", FIGURES)
def test_neutral_colours_are_the_users(name, models, data):
    colored = dict.fromkeys(
        ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], "#123456"
    )
    with matplotlib.rc_context(colored | {"svg.fonttype": "none"}):
        svg = draw(FIGURES[name](models, data[1]))
    assert "#123456" in svg
    # Black is Matplotlib's default of everything that a setting was not asked for.
    assert "#000000" not in svg and "fill: black" not in svg


def test_drawing_into_given_axes_returns_their_figure():
    figure = matplotlib.figure.Figure()
    ax = figure.subplots()
    assert plots.pit_histogram(pit(), ax=ax) is figure
    assert plots.learning_curves(histories(), ax=ax) is figure
    assert plots.coverage_curve({"a": pit()}, ax=ax) is figure
    subfigure = matplotlib.figure.Figure().subfigures(1, 2)[0]
    assert plots.pit_histogram(pit(), ax=subfigure.subplots()) is subfigure.figure


def test_density_curves_integrate_to_what_the_panel_spans(models, data):
    figure = plots.densities(models, data[1], rows=[5], num_points=600)
    curves = [line.get_xydata() for line in lines_of(figure) if len(line.get_xdata()) > 2]
    assert len(curves) == 2
    for (x, density), p in zip((curve.T for curve in curves), models.values(), strict=True):
        ends = torch.tensor([x[0], x[-1]])[:, None, None].expand(2, ROWS, 1)
        low, high = p.cdf(ends)[:, 5]
        assert np.trapezoid(density, x) == pytest.approx(float(high - low), abs=2e-3)


def test_the_observed_target_is_in_sight_and_marked(models, data):
    figure = plots.densities(models, data[1] + 50.0, rows=[2])
    target = float(data[1][2, 0]) + 50.0
    marks = [line for line in lines_of(figure) if len(line.get_xdata()) == 2]
    assert len(marks) == 2
    for mark in marks:
        assert mark.get_xdata()[0] == pytest.approx(target, rel=1e-6)
        assert mark.axes.get_xlim()[0] < target < mark.axes.get_xlim()[1]


def test_a_model_has_the_same_colour_in_every_figure(models, data):
    for figure in (plots.learning_curves(histories()), plots.coverage_curve({"mixture": pit(), "energy": pit()})):
        colors = {line.get_label(): line.get_color() for line in lines_of(figure)}
        assert colors["mixture"] == plots.COLORS[0] and colors["energy"] == plots.COLORS[1]
    text = {t.get_text(): t.get_color() for ax in plots.densities(models).axes for t in ax.texts}
    assert text["mixture"] == plots.COLORS[0] and text["energy"] == plots.COLORS[1]


def test_colours_stand_out_from_white_and_from_near_black():
    def luminance(color):
        rgb = np.array(matplotlib.colors.to_rgb(color))
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for color in plots.COLORS[:3]:
        assert 1.05 / (luminance(color) + 0.05) >= 3  # WCAG: graphics need 3 : 1
        assert (luminance(color) + 0.05) / (luminance("#131518") + 0.05) >= 3


def test_a_circle_is_drawn_whole_around_the_mean_with_ticks_of_its_range():
    p = angles()
    figure = plots.densities({"a": p}, [350.0, 10.0], rows=[1], circle=(0.0, 360.0))
    (ax,) = figure.axes
    low, high = ax.get_xlim()
    assert high - low == pytest.approx(360) and (low + high) / 2 == pytest.approx(float(p.mean[1, 0]), abs=1e-3)
    curve = ax.lines[0].get_xydata()
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(1, abs=5e-3)
    observed = ax.lines[1].get_xdata()[0]
    assert low <= observed <= high and (observed - 10) % 360 == pytest.approx(0, abs=1e-9)
    assert {label.get_text() for label in ax.get_xticklabels()} <= {"0", "90", "180", "270"}


def test_reliability_is_the_distribution_function_of_the_pit():
    line = plots.reliability_curve({"a": [0.2, 0.4, 0.6, 0.8]}).axes[0].lines[1].get_xydata()
    assert dict(line)[50.0] == 50.0 and dict(line)[10.0] == 0.0 and dict(line)[100.0] == 100.0


def test_sharpness_is_the_distribution_function_of_the_widths():
    line = plots.sharpness({"a": [1.0, 2.0, 3.0]}).axes[0].lines[0].get_xydata()
    assert line[0].tolist() == [1.0, 0.0] and line[100].tolist() == [2.0, 50.0] and line[-1].tolist() == [3.0, 100.0]


def test_bars_of_probabilities_are_the_probabilities():
    ax = plots.probabilities([2, 3, 5], [0.5, 0.3, 0.2], 3).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [0.5, 0.3, 0.2]
    assert [bar.get_x() + bar.get_width() / 2 for bar in ax.patches] == pytest.approx([2, 3, 5])
    assert [text.get_text() for text in ax.texts] == ["−1.20"]  # log 0.3


def test_whole_numbers_get_a_bar_each():
    ax = plots.histogram([0, 1, 1, 3]).axes[0]
    assert [bar.get_height() for bar in ax.patches][:4] == [1, 2, 0, 1]


def test_lowest_value_is_marked_and_early_epochs_do_not_flatten_the_rest():
    figure = plots.learning_curves(histories())
    dots = [line.get_xydata()[0] for line in lines_of(figure) if line.get_marker() == "o"]
    np.testing.assert_allclose(dots, [[3, 1.5], [4, 1.3]])


def test_pit_bars_have_mean_one():
    figure = plots.pit_histogram(pit(), bins=10)
    heights = [bar.get_height() for bar in figure.axes[0].containers[0]]
    assert len(heights) == 10 and np.mean(heights) == pytest.approx(1.0)


def test_rows_with_bad_pareto_k_are_crosses():
    k_hat = torch.zeros(ROWS)
    k_hat[:3] = 0.9
    figure = plots.log_partition(diagnostics(pareto_k=k_hat))
    crosses = [line for line in lines_of(figure) if line.get_marker() == "x"]
    assert sum(len(line.get_xdata()) for line in crosses) == 3


def test_unknown_pareto_k_is_left_out():
    draw(plots.log_partition(diagnostics(pareto_k=torch.full((ROWS,), torch.nan))))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: plots.densities({}), "models is empty"),
        (lambda m: plots.densities(m, rows=[ROWS]), "0 to 39"),
        (lambda m: plots.densities(m, rows=[]), "at least one"),
        (lambda m: plots.densities(m, rows=[0], titles=[]), "titles has 0 entries for 1 rows"),
        (lambda m: plots.densities(m, np.zeros(3)), "y has 3 rows"),
        (lambda m: plots.densities(m, np.zeros((ROWS, 2))), r"shape \(40, 2\)"),
        (lambda m: plots.densities(m, level=90), "level is 90"),
        (lambda m: plots.pit_histogram([]), "no rows"),
        (lambda m: plots.pit_histogram([0.5, 1.5]), r"outside \[0, 1\]"),
        (lambda m: plots.pit_histogram([0.5], bins=1), "bins is 1"),
        (lambda m: plots.coverage_curve({}), "models is empty"),
        (lambda m: plots.coverage_curve({"a": [np.nan]}), "NaN"),
        (lambda m: plots.learning_curves({}), "no finite value"),
        (lambda m: plots.learning_curves({"a": SimpleNamespace(validation_nll=[])}), "'a'"),
        (lambda m: plots.densities(m, circle=(3.0, 3.0)), "circle is"),
        (lambda m: plots.reliability_curve({}), "models is empty"),
        (lambda m: plots.reliability_curve({"a": [1.5]}), r"outside \[0, 1\]"),
        (lambda m: plots.sharpness({"a": [np.inf]}), "no finite width"),
        (lambda m: plots.probabilities([0, 1], [1.0]), "2 entries and shares 1"),
        (lambda m: plots.joint_draws(np.zeros((5, 1)), labels=["a"]), r"shape \(5, 1\)"),
        (lambda m: plots.joint_draws(np.zeros((5, 2)), labels=["a"]), "Pass a label for each"),
        (lambda m: plots.histogram([np.nan]), "no finite number"),
        (lambda m: plots.log_partition(diagnostics(0)), "no rows"),
        (lambda m: plots.log_partition(diagnostics(), reference=[0.0]), "reference has 1 rows"),
    ],
)
def test_bad_input_is_named(call, message, models):
    with pytest.raises(ValueError, match=message):
        call(models)


def test_models_that_predict_different_things_are_refused(models, data):
    other = er.EnergyRegressionModel.for_table(2, er.spaces.Real(2), width=8)
    other.fit_preprocessing(data[0], data[1].expand(-1, 2) + torch.randn(ROWS, 2))
    with pytest.raises(ValueError, match="one target dimension"):
        plots.densities({"two": other.eval()(data[0])})
    with pytest.raises(ValueError, match="The model predicts"):
        plots.densities(other.eval()(data[0]))
    with pytest.raises(ValueError, match="different numbers of rows"):
        plots.densities(models | {"fewer": SimpleNamespace(event_shape=(1,), batch_shape=(3,))})
