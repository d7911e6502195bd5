"""Images in files: what is wrong is said before pixels are read, or by the file's name."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import energyreg as er
from energyreg.images import features as image_features
from energyreg.images import files as image_files
from energyreg.images.features import extract_features
from energyreg.images.files import (
    ImageFiles,
    ImageMemoryError,
    ImageWorkerError,
    explain_memory,
    image_loader,
    image_paths,
)
from energyreg.images.reading import ImageFileError
from energyreg.networks.heads import SeparableHead
from energyreg.networks.image_encoders import ImageEncoder

Image = pytest.importorskip("PIL.Image")


class Mean(nn.Module):
    """Features of an image that are easily known: its mean colour, in bytes."""

    num_features = 3

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x)
        return x.float().mean((-1, -2)) * self.scale


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten grey images whose colours are 0, 20, ... 180."""
    for number in range(10):
        Image.new("RGB", (12, 8), (20 * number,) * 3).save(tmp_path / f"{number}.png")
    return tmp_path


def paths_of(folder: Path) -> list[Path]:
    return [folder / f"{number}.png" for number in range(10)]


# Lists of files ------------------------------------------------------------------------------------------------------


def test_files_come_from_lists_arrays_columns_and_folders(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    (folder / "notes.txt").write_text("no image")
    names = [f"{number}.png" for number in range(10)]
    for files in (names, np.array(names), pandas.Series(names), polars.Series(names), map(str, names)):
        assert image_paths(files, folder) == paths_of(folder)
    assert image_paths(folder) == image_paths(str(folder)) == paths_of(folder)


def test_errors_about_files_come_before_any_pixel_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "read_rgb", lambda *arguments: pytest.fail("an image was read"))
    some = [str(path) for path in paths_of(folder)]
    (folder / "empty").mkdir()
    (folder / "empty" / "a.txt").write_text("")
    cases = [
        (FileNotFoundError, [*some, "gone.jpg", "too.jpg"], r"gone.jpg \(row 10\) does not exist, and 1 more of 12"),
        (FileNotFoundError, ["https://a.org/b.jpg"], r"files: https://a.org/b.jpg \(row 0\) is an address, not a file"),
        (FileNotFoundError, [f"{some[1]} "], r"does not exist, but '.*1.png' does: take the spaces around"),
        (FileNotFoundError, [folder / "empty"], r"empty \(row 0\) is a folder"),
        (FileNotFoundError, folder / "nowhere", "the folder '.*nowhere' does not exist"),
        (ValueError, folder / "empty", r"empty' has no images \(1 other files\); expected files that end"),
        (ValueError, some[0], "a single file; expected a list of paths, or a folder"),
        (ValueError, [], "files is empty; expected at least one image"),
        (ValueError, 3, "files is a int; expected a list of paths, or a folder"),
        (ValueError, [some[0], None], "files has no path in row 1; expected paths of images"),
        (ValueError, np.array([some[0], np.nan], object), "files has no path in row 1"),
        (ValueError, [some[0], 7], "files has a int: 7 in row 1"),
        (ValueError, np.array([some]), "files is a ndarray of 2 dimensions"),
        (ValueError, [*some, some[3]], r"3.png in row 3 and in row 10; expected each file once.*duplicates=\"allow\""),
    ]  # fmt: skip
    for kind, files, message in cases:
        with pytest.raises(kind, match=message):
            ImageFiles(files)
    with pytest.raises(FileNotFoundError, match=r"Paths start at '.*': is folder right\?"):
        ImageFiles(["gone.png"], folder=folder)
    assert len(ImageFiles([*some, some[3]], duplicates="allow")) == 11


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([1.0] * 9, "targets has 9 rows, but files has 10; expected one target for each row of files"),
        ([1.0] * 9 + [None], "targets has NaN or infinity in 1 of 10 rows, the first in row 9, column 0: nan"),
        ([1.0] * 9 + [float("inf")], "in row 9, column 0: inf; expected finite numbers"),
        (["1"] * 9 + ["old"], "targets holds text, the first in row 9: 'old'; expected numbers"),
        (np.zeros((10, 2, 2)), r"targets has shape \(10, 2, 2\); expected \(n,\), or \(n, D\)"),
    ],
)
def test_targets_that_cannot_be_used_are_named(folder: Path, targets: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFiles(paths_of(folder), targets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size is 0; expected a whole number of at least 1"),
        ({"resize": "pad"}, "resize is 'pad'; expected 'squash' or 'crop'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; expected 'raise' or 'skip'"),
        ({"duplicates": "drop"}, "duplicates is 'drop'; expected 'raise' or 'allow'"),
        ({"transform": 3}, "transform is a int; expected a callable"),
    ],
)
def test_settings_that_cannot_be_used_are_named(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFiles(paths_of(folder), **arguments)
    files = ImageFiles(paths_of(folder))
    with pytest.raises(ValueError, match="batch_size is 0; expected a whole number of at least 1"):
        image_loader(files, 0)
    with pytest.raises(ValueError, match="workers is -1; expected a whole number of at least 0"):
        image_loader(files, workers=-1)
    with pytest.raises(ValueError, match="files is a list; expected ImageFiles"):
        image_loader(paths_of(folder))  # type: ignore[arg-type]


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_yields_images_with_their_targets(folder: Path, workers: int) -> None:
    files = ImageFiles(paths_of(folder), np.arange(10), size=4)
    batches = list(image_loader(files, 4, workers=workers))
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 4, 4), (4, 3, 4, 4), (2, 3, 4, 4)]
    for x, y in batches:
        assert torch.equal(x[:, 0, 0, 0].double(), 20 * y[:, 0])
    assert image_loader(files.take([3, 1])).dataset[0][1][0][0, 0, 0] == 60
    assert sorted(float(v) for _, y in image_loader(files, 4, shuffle=True) for v in y) == list(range(10))


def test_a_transform_changes_the_image_and_its_target(folder: Path) -> None:
    files = ImageFiles(paths_of(folder), np.arange(10), size=4, transform=lambda x, y: (255 - x, -y))
    image, target = files[3]
    assert int(image[0, 0, 0]) == 195 and target.tolist() == [-3.0]
    assert float(files.targets[3, 0]) == 3.0
    cut = ImageFiles(paths_of(folder), size=4, transform=lambda x, y: (x[:, : 1 + int(x[0, 0, 0]) // 60], y))
    with pytest.raises(
        ValueError, match=r"3.png has shape \(3, 2, 4\) after the transform, but .*0.png has \(3, 1, 4\)"
    ):
        list(image_loader(cut, 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_named_or_skipped_and_counted(folder: Path, workers: int) -> None:
    for number in (1, 4, 5, 6, 7):  # 4 to 7 are a whole batch
        (folder / f"{number}.png").write_text("This is no image.")
    files = ImageFiles(paths_of(folder), np.arange(10), size=4)
    with pytest.raises(ImageFileError, match=r"^.*1.png cannot be read as an image: cannot identify"):
        list(image_loader(files, 4, workers=workers))
    files = ImageFiles(paths_of(folder), np.arange(10), size=4, on_error="skip")
    message = r"5 of 10 images could not be read and were left out: .*1.png, .*4.png, .*5.png and 2 more. The first: "
    loader = image_loader(files, 4, workers=workers)
    with pytest.warns(UserWarning, match=message):
        batches = list(loader)
    assert [y[:, 0].tolist() for _, y in batches] == [[0, 2, 3], [8, 9]]
    assert len(files.failed) == 5
    assert len(list(loader)) == 2  # said once


class _Dying(ImageFiles):
    def __getitem__(self, index: int) -> Tensor:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_dies_says_which_setting_helps(folder: Path) -> None:
    loader = image_loader(_Dying(paths_of(folder), size=4), 2, workers=1)
    with pytest.raises(
        ImageWorkerError, match=r"Lower workers \(now 1; 0 reads in this process\) or batch_size \(now 2\)"
    ):
        list(loader)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_which_settings_help(folder: Path, error: Exception) -> None:
    class Large(Mean):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    with pytest.raises(
        ImageMemoryError, match=r"^Out of memory: .* Lower batch_size \(now 5\) or image_size \(now 9\)"
    ):
        extract_features(Large(), ImageFiles(paths_of(folder), size=9), 5)
    with pytest.raises(RuntimeError, match="other"), explain_memory(batch_size=1):
        raise RuntimeError("other")


def test_a_model_is_trained_on_a_loader_of_images(folder: Path) -> None:
    pytest.importorskip("timm")
    encoder = ImageEncoder("timm:test_resnet", trainable=1)
    model = er.EnergyRegressionModel(encoder, SeparableHead(encoder.num_features))
    files = ImageFiles(paths_of(folder), np.arange(10) + 0.5, size=32, on_error="skip")
    (folder / "9.png").write_text("This is no image.")
    model.fit_preprocessing(None, files.targets)  # else the images are read once more, for the units
    with pytest.warns(UserWarning, match=r"1 of 10 images could not be read"):
        history = er.fit(model, image_loader(files, 5, shuffle=True), epochs=2, validation=image_loader(files, 5))
    assert len(history.validation_nll) == 2 and np.isfinite(history.validation_nll).all()


# Features ------------------------------------------------------------------------------------------------------------


def test_features_are_those_of_each_image_in_order(folder: Path) -> None:
    files = ImageFiles([*paths_of(folder), folder / "2.png"], size=4, duplicates="allow")
    network = Mean().train()
    features = extract_features(network, files, 3)
    assert features.dtype == np.float32 and features.shape == (11, 3)
    assert np.array_equal(features, np.repeat([[20.0 * n] for n in [*range(10), 2]], 3, 1).astype(np.float32))
    assert network.calls == 10 and network.training  # a file once, and the mode is as before


def test_a_cache_is_asked_by_content_and_network(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    paths, network = paths_of(folder), Mean()

    def calls(paths: list[Path], network: Mean = network, size: int = 4, resize: str = "squash") -> int:
        before = network.calls
        files = ImageFiles(paths, size=size, resize=resize, duplicates="allow")
        expected = extract_features(Mean(network.scale.item()), files)
        assert np.array_equal(extract_features(network, files, 4, cache=cache), expected)
        return network.calls - before

    assert [calls(paths[:6]), calls(paths[::-1]), calls(paths[3:4] * 2)] == [6, 4, 0]
    assert [calls(paths, size=5), calls(paths, resize="crop"), calls(paths, Mean(2.0))] == [10, 10, 10]
    assert calls(paths, Mean()) == 0  # another object with the same weights
    Image.new("RGB", (12, 8), (7, 7, 7)).save(folder / "3.png")
    assert calls(paths) == 1


def test_a_damaged_cache_is_computed_again(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    files, network = ImageFiles(paths_of(folder), size=4), Mean()
    expected = extract_features(network, files, cache=cache)
    (shard,) = cache.rglob("*.safetensors")
    whole = shard.read_bytes()
    changed = bytearray(whole)
    changed[-5] ^= 64
    for content in (whole[:-9], bytes(changed), b"", b"text"):
        shard.write_bytes(content)
        before = network.calls
        assert np.array_equal(extract_features(network, files, cache=cache), expected)
        assert network.calls - before == 10
        extract_features(network, files, cache=cache)
        assert network.calls - before == 10


def test_work_goes_on_where_it_was_killed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(image_features, "SHARD", 4)

    class Killed(Mean):
        def forward(self, x: Tensor) -> Tensor:
            if self.calls >= 6:
                os._exit(9)
            return super().forward(x)

    files = ImageFiles(paths_of(folder), size=4)
    monkeypatch.setattr(image_features, "_network_key", lambda *arguments: "key")
    child = os.fork()
    if child == 0:
        extract_features(Killed(), files, 2, cache=cache)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9 << 8
    network = Mean()
    features = extract_features(network, files, 2, cache=cache)
    assert network.calls == 6  # of the six images before the end, a file of four was written
    assert np.array_equal(features[:, 0], np.arange(0, 200, 20))


def test_an_error_loses_nothing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    (folder / "7.png").write_text("This is no image.")
    network = Mean()
    with pytest.raises(ImageFileError, match=r"7.png"):
        extract_features(network, ImageFiles(paths_of(folder), size=4), 2, cache=cache)
    files = ImageFiles(paths_of(folder), size=4, on_error="skip")
    with pytest.warns(UserWarning, match=r"1 of 4 images could not be read"):
        features = extract_features(network, files, 2, cache=cache)
    assert network.calls == 9
    assert np.isnan(features[:, 0]).nonzero()[0].tolist() == [7] and len(files.failed) == 1


def test_features_that_cannot_be_had_are_explained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = ImageFiles(paths_of(folder), size=4)
    with pytest.raises(ValueError, match="encoder is a Linear without num_features"):
        extract_features(nn.Linear(1, 1), files)
    with pytest.raises(ValueError, match=r"0.png: the network's features are not finite"):
        extract_features(Mean(float("nan")), files)
    with pytest.raises(ValueError, match=r"files has a transform, whose results a cache cannot tell apart"):
        extract_features(Mean(), ImageFiles(paths_of(folder), transform=lambda x, y: (x, y)), cache=folder)
    place = tmp_path_factory.mktemp("cache") / "file"
    place.write_text("")
    with pytest.raises(OSError, match="Cannot write: a part of the path is a file"):
        extract_features(Mean(), files, cache=place)


def test_progress_is_shown_when_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extract_features(Mean(), ImageFiles(paths_of(folder), size=4), 4, progress=True)
    out, shown = capsys.readouterr()
    assert (out, shown.startswith("Features: 10 of 10 images, ")) == ("", True)
    extract_features(Mean(), ImageFiles(paths_of(folder), size=4), 4, progress=False)
    assert capsys.readouterr() == ("", "")
