"""The log-density as one graph: exported, compiled, moved and pickled models give the same numbers."""

import copy
import io
import shutil
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

import energyreg as er
from energyreg.models.export import LogDensity

ROWS = 40


def _model(kind: str, space: er.spaces.TargetSpace | None = None) -> tuple[er.EnergyRegressionModel, ...]:
    torch.manual_seed(0)
    dim = 1 if space is None else space.dim
    x = torch.randn(ROWS, 3)
    y = (x[:, :1] + torch.randn(ROWS, dim)).exp().clamp_max(5)
    make = er.EnergyRegressionModel
    if kind == "marginal":
        model = make.for_table(3, space, width=16)
    elif kind == "mixture base":
        model = make.for_table(3, space, width=16, num_rows=ROWS)
    else:
        model = make.mixture_for_table(3, space, width=16)
    model.fit_preprocessing(x, y)
    for parameter in [] if model.head is None else model.head.parameters():
        if not bool(parameter.any()):  # heads start at zero
            nn.init.normal_(parameter, std=0.2)
    return model.eval(), x, y


KINDS = ["marginal", "mixture base", "mixture"]
SPACES = {
    "real": lambda: None, "positive": lambda: er.spaces.Positive(), "circle": lambda: er.spaces.Circle(),
    "interval": lambda: er.spaces.Interval(0, 6), "plane": lambda: er.spaces.Real(2),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "space"),
    [("marginal", "positive"), ("marginal", "circle"), ("marginal", "plane"), ("mixture base", "interval"),
     ("mixture base", "plane"), ("mixture", "real")],
)  # fmt: skip
def test_exported_log_density_is_that_of_the_model(kind: str, space: str) -> None:
    model, x, y = _model(kind, SPACES[space]())
    rows = torch.export.Dim("rows", min=2)
    with torch.no_grad():
        program = torch.export.export(LogDensity(model), (x[:4], y[:4]), dynamic_shapes=({0: rows}, {0: rows}))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        exported = torch.export.load(file).module()(x, y)
    # In two dimensions a mixture base is integrated by samples in prediction, by a grid here.
    sampled = space == "plane" and kind == "mixture base"
    torch.testing.assert_close(exported, model(x).log_prob(y), rtol=0, atol=0.05 if sampled else 2e-4)


@pytest.mark.slow  # half a minute of compiling; that the density is one graph of these numbers is checked above
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler itself
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_log_density_is_that_of_the_model() -> None:
    model, x, y = _model("mixture base")
    density = LogDensity(model)
    with torch.no_grad():
        compiled = torch.compile(density, fullgraph=True, dynamic=True)(x, y)
        torch.testing.assert_close(compiled, density(x, y), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_copied_pickled_and_moved_models_give_the_same_numbers(kind: str) -> None:
    model, x, y = _model(kind)
    expected = model(x).log_prob(y)
    # As a worker process of torch receives it.
    received = ForkingPickler.loads(ForkingPickler.dumps(model))
    for other in (received, copy.deepcopy(model)):
        assert torch.equal(other(x).log_prob(y), expected)
    torch.testing.assert_close(copy.deepcopy(model).double()(x).log_prob(y).float(), expected, rtol=0, atol=1e-4)


def test_more_than_two_dimensions_are_refused() -> None:
    model, *_ = _model("mixture base", er.spaces.Real(3))
    with pytest.raises(ValueError, match="The target has 3 dimensions; a fixed grid of nodes serves at most 2"):
        LogDensity(model)
    mixture, x, y = _model("mixture", er.spaces.Real(3))  # no partition function, no nodes
    torch.testing.assert_close(LogDensity(mixture)(x, y), mixture(x).log_prob(y), rtol=0, atol=2e-5)


def test_number_of_nodes_is_checked() -> None:
    with pytest.raises(ValueError, match="num_nodes is 0"):
        LogDensity(_model("marginal")[0], num_nodes=0)
