"""Laws that every model obeys that `fit` trains; a new model gets its tests by one entry in MODELS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import energyreg as er
from energyreg.training.trainable import check_trainable

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(120, 2, generator=GENERATOR)
Y = X[:, :1] + 0.1 * torch.randn(120, 1, generator=GENERATOR)
Model = er.EnergyRegressionModel


def detector() -> nn.Module:
    """A small FCOS with random weights and an energy head."""
    pytest.importorskip("torchvision")
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    class Backbone(nn.Module):
        out_channels = 32

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 5, 4, 2)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"0": self.stem(images).relu()}

    anchors = AnchorGenerator(((8.0,),), ((1.0,),))
    return er.vision.add_energy_head(FCOS(Backbone(), 3, anchor_generator=anchors, min_size=64, max_size=96), width=16)


def pictures(broken: bool = False) -> DataLoader[Any]:
    """Six pictures with two boxes each, the corners of one the wrong way round where they are broken."""
    pytest.importorskip("torchvision")
    from torchvision import tv_tensors

    generator = torch.Generator().manual_seed(0)
    records = []
    for _ in range(6):
        corner = 30 * torch.rand(2, 2, generator=generator)
        boxes = torch.cat([corner, corner + 8 + 20 * torch.rand(2, 2, generator=generator)], 1)
        if broken:
            boxes[0] = boxes[0].flip(0)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(64, 80)),
            "labels": torch.tensor([1, 2]),
        }
        records.append((torch.rand(3, 64, 80, generator=generator), target))
    return DataLoader(records, batch_size=3, collate_fn=detector().collate)


@dataclass(frozen=True)
class Case:
    """A model, and what it is trained on."""

    build: Callable[[], Any]
    data: Callable[[], tuple[Any, ...]] = lambda: (X, Y)
    bad: Callable[[], tuple[Any, ...]] = lambda: (X, torch.full_like(Y, torch.nan))
    steps: int = 4  # an epoch
    doubles: bool = True

    def make(self) -> Any:
        """The model with the first weights of a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build()

    def fit(self, model: Any, **settings: Any) -> er.History:
        """Train it a little."""
        given = {"epochs": 4, "batch_size": 30, "learning_rate": 0.01, "progress": False, "validation": None} | settings
        return er.fit(model, *self.data(), **given)


MODELS = {
    "marginal as base": Case(lambda: Model.for_table(2, width=16, dropout=0.0)),
    "proposal as base": Case(lambda: Model.for_table(2, width=16, dropout=0.0, num_rows=120)),
    "mixture": Case(lambda: Model.mixture_for_table(2, width=16, dropout=0.0)),
    "factor of a chain": Case(lambda: er.EnergyChain.for_table(1, er.spaces.Real(2), width=16, dropout=0.0).factors[1]),
    "detector": Case(detector, lambda: (pictures(),), lambda: (pictures(broken=True),), 2, doubles=False),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    return MODELS[request.param]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_fit_lowers_the_loss_by_the_seed_alone_and_ends_in_evaluation_mode(case: Case) -> None:
    first, second = case.make(), case.make()
    check_trainable(first)
    history = case.fit(first, epochs=6)
    torch.manual_seed(9)
    case.fit(second, epochs=6)
    assert history.train_loss[-1] < history.train_loss[0]
    assert same(first, second) and first.fitted and not first.training


def test_an_interrupted_training_resumes_to_the_same_bits(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes in the third of four epochs; another model goes on from the file of the second."""
    straight, broken, resumed = case.make(), case.make(), case.make()
    case.fit(straight)
    step, count = torch.optim.AdamW.step, 0

    def interrupt(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2 * case.steps + 1:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.warns(UserWarning, match="interrupted"):
        history = case.fit(broken, checkpoint_dir=tmp_path)
    assert history.interrupted and not same(straight, broken)
    monkeypatch.undo()
    case.fit(resumed, checkpoint_dir=tmp_path, resume=True)
    assert same(straight, resumed)


def test_gradients_reach_every_parameter_that_is_to_be_trained(case: Case) -> None:
    model = case.make()
    case.fit(model, epochs=1)
    model.train()
    x, y = next(iter(case.data()[0])) if isinstance(case.data()[0], DataLoader) else case.data()
    loss = model.default_objective()(*model.condition(x, y), generator=torch.Generator().manual_seed(0))
    loss.per_example.sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == [] and all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_double_precision_trains(case: Case) -> None:
    if not case.doubles:
        pytest.skip("torchvision's detectors compute in single precision")
    model = case.make()
    assert case.fit(model, precision="64-true").train_loss[-1] < 10 and model.dtype == torch.float64


def test_bad_targets_are_refused_before_anything_changes(case: Case) -> None:
    model, untouched = case.make(), case.make()
    with pytest.raises(ValueError, match=r"y |boxes"):
        er.fit(model, *case.bad(), epochs=1, progress=False)
    assert same(model, untouched)
