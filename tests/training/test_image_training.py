"""`er.fit` on images: in two processes as in one, on after a kill, in bfloat16, and with an image left by itself."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import energyreg as er
from energyreg.images.files import ImageFiles, image_loader
from energyreg.networks.heads import SeparableHead

Image = pytest.importorskip("PIL.Image")

COUNT = 20
KILLED_AT = 75
"""Image at which a training is killed: 20 are read for the units, at most 20 to look at a batch, and 20 an epoch."""


class Convolution(nn.Sequential):
    """A network with or without batch normalisation, whose statistics differ between a batch and its halves."""

    num_features = 4

    def __init__(self, normalised: bool) -> None:
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(4)] if normalised else []
        super().__init__(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *norm)


def make(folder: Path) -> Path:
    """Images whose brightness tells the target."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = np.clip(10 * number + rng.normal(0, 10, (8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def files_of(folder: Path, **settings: Any) -> ImageFiles:
    return ImageFiles(sorted(folder.glob("*.png")), np.arange(COUNT) / COUNT, size=8, **settings)


def model_of(normalised: bool = True) -> er.EnergyRegressionModel:
    encoder = er.ImageEncoder(Convolution(normalised), trainable="all")
    return er.EnergyRegressionModel(encoder, SeparableHead(encoder.num_features))


def shared_out(folder: Path, batch_size: int, **settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Batches in the order of the rows: those of two processes are the halves of those of one."""
    model = model_of(normalised=False)
    history = er.fit(
        model, image_loader(files_of(folder), batch_size), epochs=3, learning_rate=0.01, precision="64-true",
        validation=image_loader(files_of(folder), batch_size), **settings,
    )  # fmt: skip
    return history.train_loss, model.state_dict()


def main(task: str, folder: Path, output: Path) -> None:
    """What each process does that a test starts."""
    torch.set_num_threads(1)
    if task == "kill":
        resumable(folder, output, KILLED_AT)
        return
    two = {"accelerator": "cpu", "devices": 2}
    losses, state = shared_out(folder, 5, **two)
    (folder / "07.png").write_text("no image")  # both write the same, and only one of them reads it
    files, model = files_of(folder, on_error="skip"), model_of()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        er.fit(model, image_loader(files, 5, shuffle=True, workers=1), epochs=2, validation=None, **two)
    result = {"losses": losses, "state": state, "skipped": model.state_dict()}
    torch.save(result, output / f"rank{os.environ['RANK']}.pt")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(er.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_train_as_one_and_skip_a_broken_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    folder = make(tmp_path / "images")
    losses, state = shared_out(folder, 10)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = run(*torchrun, __file__, "share", folder, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["losses"] == pytest.approx(losses, abs=1e-12) and first["losses"] == second["losses"]
    assert losses[-1] < losses[0]
    for name, tensor in state.items():
        assert float((first["state"][name].double() - tensor.double()).abs().max()) <= 1e-7, name
    for name, tensor in first["skipped"].items():
        if "running" not in name:  # statistics of a batch are those of its process
            assert torch.equal(tensor, second["skipped"][name]), name


def resumable(
    folder: Path, checkpoints: Path, last: int | None = None, resume: bool = False
) -> tuple[er.EnergyRegressionModel, int]:
    """A training that is killed at the image of that number, and how many images it saw."""
    seen = 0

    def see(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal seen
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return (image.flip(-1) if torch.rand(()) < 0.5 else image), target

    model = model_of()
    loader = image_loader(files_of(folder, transform=see), 5, shuffle=True)
    er.fit(
        model, loader, epochs=4, validation=image_loader(files_of(folder), 5), checkpoint_dir=checkpoints,
        resume=resume, precision="64-true",
    )  # fmt: skip
    return model, seen


@pytest.mark.slow
def test_a_training_on_images_goes_on_after_a_kill(tmp_path: Path) -> None:
    for name in ("images", "whole", "killed"):
        (tmp_path / name).mkdir()
    folder = make(tmp_path / "images")
    expected, seen = resumable(folder, tmp_path / "whole")
    done = run(__file__, "kill", folder, tmp_path / "killed")
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    assert (tmp_path / "killed" / "last.safetensors").is_file()
    resumed, seen_again = resumable(folder, tmp_path / "killed", resume=True)
    assert seen_again < seen  # the epochs before the kill are not repeated
    state = resumed.state_dict()
    assert any("running_mean" in name for name in state)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_bfloat16_on_the_cpu(tmp_path: Path) -> None:
    model, kinds = model_of(), set()
    network = model.encoder.network
    network[0].register_forward_hook(lambda *arguments: kinds.add(arguments[-1].dtype))
    loader = image_loader(files_of(make(tmp_path)), 10)
    history = er.fit(model, loader, epochs=3, learning_rate=0.03, precision="bf16-mixed", validation=loader)
    assert torch.bfloat16 in kinds
    assert np.isfinite(history.validation_nll).all() and history.train_loss[-1] < history.train_loss[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    images, targets = next(iter(loader))
    assert model(images).log_prob(targets).isfinite().all()


def test_an_image_by_itself_is_normalised_by_the_running_statistics() -> None:
    encoder = er.ImageEncoder(Convolution(normalised=True), trainable="all")
    norm = encoder.network[-1]
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    encoder(images)
    before = norm.running_mean.clone()
    assert before.abs().max() > 0  # several images move them
    alone = encoder(images[:1])
    assert torch.equal(norm.running_mean, before) and norm.training
    alone.sum().backward()
    assert norm.weight.grad.abs().max() > 0
    assert torch.allclose(alone, encoder.eval()(images[:1]))


@pytest.mark.parametrize("broken", [0, 1])
def test_a_batch_of_one_image_is_trained_on(broken: int, tmp_path: Path) -> None:
    """Of 20 images the 21st is missing for a last batch of three; of a batch of two one may be broken."""
    folder = make(tmp_path)
    if broken:
        (folder / "03.png").write_text("no image")
    files, model = files_of(folder, on_error="skip"), model_of()
    loader = image_loader(files, 2 if broken else 19)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sizes = [len(images) for images, _ in loader]
        history = er.fit(model, loader, epochs=2)
    assert 1 in sizes and sum(sizes) == COUNT - broken
    assert any("1 of 20 images could not be read" in str(each.message) for each in caught) == bool(broken)
    assert np.isfinite(history.train_loss).all()


def test_fine_tuning_with_single_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    folder = make(tmp_path)
    (folder / "03.png").write_text("no image")
    regressor = er.ImageRegressor(
        backbone=Convolution(normalised=True), image_size=8, fine_tune=1, trainable="all", image_batch_size=1,
        on_error="skip", n_members=1, epochs=1, width=8, random_state=0,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"1 of 20 images could not be read"):
        regressor.fit(sorted(folder.glob("*.png")), np.arange(COUNT) / COUNT)
    assert list(regressor.skipped_) == [str(folder / "03.png")]
    assert np.isfinite(regressor.fine_tuning_.train_loss).all()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
