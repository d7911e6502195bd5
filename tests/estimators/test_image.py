"""`ImageRegressor`: files in, densities out; what it learned is in one file."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn

import energyreg as er
from energyreg import files as model_files
from energyreg.estimators import image as image_estimator
from energyreg.images.reading import ImageFileError

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("timm")

FEW = {"n_members": 1, "epochs": 12, "width": 16, "depth": 1, "random_state": 0, "image_size": 32}
BACKBONE = {"backbone": "timm:test_resnet", "weights": None, "workers": 0}


class Colours(nn.Module):
    """Mean and spread of the colours: features that tell the target."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean((-1, -2)), x.std((-1, -2))], 1) * self.scale


def make(folder: Path, count: int = 80) -> tuple[list[str], np.ndarray]:
    """Images whose brightness is the target, from 0 to 1, with noise."""
    rng = np.random.default_rng(0)
    y = rng.uniform(0.1, 0.9, count)
    paths = []
    for number, value in enumerate(y):
        pixels = np.clip(255 * value + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        paths.append(str(folder / f"{number:03}.png"))
    return paths, y


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], np.ndarray]:
    return make(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def fitted(data: tuple[list[str], np.ndarray]) -> er.ImageRegressor:
    paths, y = data
    return er.ImageRegressor(**{**FEW, "epochs": 30}, backbone=Colours(), target=("interval", 0, 1)).fit(paths, y)


def test_densities_of_images_are_learned(fitted: er.ImageRegressor, data: tuple[list[str], np.ndarray]) -> None:
    """Brightness is known to about 20 / 255 / 16 from an image; a uniform density on (0.1, 0.9) scores 0.22 nats."""
    paths, y = data
    assert fitted.score_samples(paths, y).mean() > 1.0
    assert np.abs(fitted.predict(paths) - y).mean() < 0.05
    low, high = fitted.predict_interval(paths, 0.9).T
    assert 0.75 < ((low <= y) & (y <= high)).mean() <= 1
    assert fitted.predict_quantiles(paths[:3]).shape == (3, 3) and fitted.sample(paths[:3], 4).shape == (3, 4)
    assert fitted.predict_distribution(paths[:3]).log_prob(torch.tensor(y[:3])).shape == (3,)


def test_it_takes_lists_arrays_columns_frames_and_folders(
    fitted: er.ImageRegressor, data: tuple[list[str], np.ndarray]
) -> None:
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    paths, _ = data
    expected = fitted.predict(paths)
    frame = pandas.DataFrame({"age": 3, "image": paths})
    for files in (
        np.array(paths), np.array(paths)[:, None], frame["image"], frame, polars.DataFrame({"image": paths}),
        Path(paths[0]).parent,
    ):  # fmt: skip
        assert np.array_equal(fitted.predict(files), expected)
    with pytest.raises(
        ValueError, match=r"X has no column 'image' with the files; its columns are 'file'. Pass image="
    ):
        fitted.predict(frame.rename(columns={"image": "file"})[["file"]])


def test_an_ensemble_and_a_chain_are_built_on_features(data: tuple[list[str], np.ndarray]) -> None:
    paths, y = data
    both = np.stack([y, 1 - y], 1)
    settings = {**FEW, "epochs": 2, "backbone": Colours()}
    chain = er.ImageRegressor(**settings, outputs="chain", conformal=False).fit(paths, both)
    assert chain.predict(paths[:3]).shape == (3, 2)
    several = er.ImageRegressor(**{**settings, "n_members": 2}, conformal=True).fit(paths, y)
    assert len(several.histories_) == 2 and several.predict_interval(paths[:3]).shape == (3, 2)
    for model in (chain, several):
        kinds = {type(module).__name__ for module in model.model_.modules()}
        assert "VectorEncoder" in kinds
    assert not any(type(module).__name__ == "TableEncoder" for module in several.model_.modules())


def test_fine_tuning_moves_the_last_stages_and_what_is_saved_predicts_alike(
    data: tuple[list[str], np.ndarray], tmp_path: Path
) -> None:
    paths, y = data
    seen = []

    def augment(image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(target.shape)
        return image.flip(-1), target

    torch.manual_seed(0)
    network = er.ImageEncoder("timm:test_resnet").network
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    settings = {**FEW, **BACKBONE, "weights": tmp_path / "weights.pth", "epochs": 2}
    regressor = er.ImageRegressor(**settings, fine_tune=1, trainable=1, augment=augment, cache=tmp_path / "cache")
    regressor.fit(paths, y)
    after = regressor.encoder_.network.state_dict()
    moved = {n.split(".")[0] for n, t in network.state_dict().items() if not torch.equal(t, after[n])}
    assert moved == {"layer4"}
    # Of 80 images 8 are held out, and 8 fill no batch of 64; a first batch is looked at beforehand.
    assert len(seen) == 128 and set(seen) == {(1,)}
    assert len(regressor.fine_tuning_.validation_nll) == 1
    path = regressor.save(tmp_path / "model")
    (tmp_path / "weights.pth").unlink()
    loaded = er.ImageRegressor.load(path)
    assert np.array_equal(loaded.score_samples(paths, y), regressor.score_samples(paths, y))
    assert {loaded.cache, loaded.weights, loaded.augment, loaded.folder} == {None}  # of the machine, not of the file
    assert not any(parameter.requires_grad for parameter in loaded.encoder_.parameters())


def test_a_fine_tuning_that_was_killed_goes_on(data: tuple[list[str], np.ndarray], tmp_path: Path) -> None:
    paths, y = data
    calls = 0

    def dies(image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls > 150:  # in the second epoch: 64 images are looked at beforehand, and an epoch has 64
            raise RuntimeError("killed")
        return image, target

    def lives(image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image, target

    torch.manual_seed(0)
    torch.save(er.ImageEncoder("timm:test_resnet").network.state_dict(), tmp_path / "weights.pth")
    settings = {**FEW, **BACKBONE, "weights": tmp_path / "weights.pth", "epochs": 1, "fine_tune": 3}
    whole = er.ImageRegressor(**settings, augment=lives).fit(paths, y)
    with pytest.raises(Exception, match="killed"):
        er.ImageRegressor(**settings, augment=dies, checkpoint_dir=tmp_path / "state").fit(paths, y)
    assert (tmp_path / "state" / "last.safetensors").exists()
    resumed = er.ImageRegressor(**settings, augment=lives, checkpoint_dir=tmp_path / "state").fit(paths, y)
    for name, tensor in whole.encoder_.network.state_dict().items():
        assert torch.equal(resumed.encoder_.network.state_dict()[name], tensor), name
    assert np.array_equal(resumed.score_samples(paths, y), whole.score_samples(paths, y))
    assert er.ImageRegressor.load(resumed.save(tmp_path / "model")).checkpoint_dir is None


def test_a_network_of_ones_own_is_handed_to_load(
    fitted: er.ImageRegressor, data: tuple[list[str], np.ndarray], tmp_path: Path
) -> None:
    path = fitted.save(tmp_path / "model")
    with pytest.raises(er.CheckpointError, match="Colours, which is not energyreg's"):
        er.ImageRegressor.load(path)
    loaded = er.ImageRegressor.load(path, encoder=er.ImageEncoder(Colours()))
    assert np.array_equal(loaded.predict(data[0]), fitted.predict(data[0]))
    table = er.EnergyRegressor(n_members=1, epochs=1, width=8).fit(np.random.rand(40, 2), np.random.rand(40))
    with pytest.raises(er.CheckpointError, match="it is an EnergyRegressor, for tables"):
        er.ImageRegressor.load(table.save(tmp_path / "table"))


def test_fit_reads_a_table_of_files(data: tuple[list[str], np.ndarray]) -> None:
    pandas = pytest.importorskip("pandas")
    paths, y = data
    folder = Path(paths[0]).parent
    table = folder / "labels.csv"
    pandas.DataFrame({"file": [Path(path).name for path in paths], "y": y}).to_csv(table, index=False)
    settings = {**FEW, "epochs": 2, "backbone": Colours()}
    regressor = er.ImageRegressor(**settings, image="file").fit_file(table, "y")
    expected = er.ImageRegressor(**settings).fit(paths, y).predict(paths)
    np.testing.assert_allclose(regressor.predict(paths), expected, rtol=1e-4)  # a number in text has fewer digits
    with pytest.raises(ValueError, match="there is no column 'image'"):
        er.ImageRegressor(**settings).fit_file(table, "y")


def test_the_same_seed_gives_the_same_model_and_a_clone_has_the_same_parameters(
    fitted: er.ImageRegressor, data: tuple[list[str], np.ndarray]
) -> None:
    again = clone(fitted)
    assert {n: v for n, v in again.get_params().items() if n != "backbone"} == {
        n: v for n, v in fitted.get_params().items() if n != "backbone"
    }
    assert np.array_equal(again.fit(*data).predict(data[0]), fitted.predict(data[0]))
    with pytest.raises(NotFittedError):
        clone(fitted).predict(data[0])


def test_what_counts_is_what_was_fitted(
    data: tuple[list[str], np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, y = data
    regressor = er.ImageRegressor(**{**FEW, "epochs": 1}, backbone=Colours(), resize="crop").fit(paths, y)
    before = regressor.predict(paths)
    content = model_files.read_tensors(regressor.save(tmp_path / "model"), model_files.ESTIMATOR)[1]
    regressor.set_params(image_size=8, resize="squash", backbone="timm:test_resnet", weights=None, image_batch_size=7)
    regressor._recent = None  # features of the last call
    np.testing.assert_allclose(regressor.predict(paths), before, rtol=1e-6)
    assert model_files.read_tensors(regressor.save(tmp_path / "again"), model_files.ESTIMATOR)[1] == content
    monkeypatch.setattr(image_estimator, "fit_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        regressor.fit(paths, y)
    np.testing.assert_allclose(regressor.predict(paths), before, rtol=1e-6)


def test_broken_images_are_left_out_of_fit_and_named_in_predictions(tmp_path: Path) -> None:
    paths, y = make(tmp_path, 30)
    Path(paths[4]).write_text("no image")
    settings = {**FEW, "epochs": 1, "backbone": Colours()}
    with pytest.raises(ImageFileError, match=r"004.png cannot be read as an image"):
        er.ImageRegressor(**settings).fit(paths, y)
    for fine_tune in (False, 1):
        regressor = er.ImageRegressor(**settings, on_error="skip", fine_tune=fine_tune, trainable="all")
        with pytest.warns(UserWarning, match=r"1 of 30 images could not be read and were left out: .*004.png"):
            regressor.fit(paths, y)
        assert list(regressor.skipped_) == [paths[4]]
        with pytest.raises(ImageFileError, match=r"004.png cannot be read"):
            regressor.predict(paths)


def test_wrong_data_are_named_before_an_image_is_read(
    data: tuple[list[str], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from energyreg.images import files as images

    monkeypatch.setattr(images, "read_rgb", lambda *arguments: pytest.fail("an image was read"))
    paths, y = data
    bad = copy.copy(y)
    bad[3] = 1.5
    cases = [
        (paths, [None, *y[1:]], "y has NaN or infinity in 1 of 80 rows, the first in row 0"),
        (paths, ["old", *y[1:]], "y holds text, the first in row 0: 'old'"),
        (paths, y[1:], "y has 79 rows, but X has 80"),
        (paths, None, "y is missing"),
        (paths, bad, "1.5"),
        ([*paths[:-1], paths[0]], y, "in row 0 and in row 79; expected each file once"),
        (None, y, "X is None; expected files"),
    ]
    for files, targets, message in cases:
        with pytest.raises(ValueError, match=message):
            er.ImageRegressor(**FEW, backbone=Colours(), target=("interval", 0, 1)).fit(files, targets)
    with pytest.raises(FileNotFoundError, match=r"gone.png \(row 1\) does not exist"):
        er.ImageRegressor(**FEW, backbone=Colours()).fit([paths[0], "gone.png"], [1.0, 2.0])
    for wrong, message in (
        ({"image_size": 0}, "image_size is 0"),
        ({"image_batch_size": 1.5}, "image_batch_size is 1.5"),
        ({"fine_tune": -1}, "fine_tune is -1; expected a whole number of at least 1, True or False"),
        ({"augment": 3}, "augment is a int; expected a callable"),
        ({"backbone": "resnet"}, 'expected "timm:NAME"'),
    ):
        with pytest.raises(ValueError, match=message):
            er.ImageRegressor(**{**FEW, "weights": None, **wrong}).fit(paths, y)


def test_an_evaluation_set_of_images_chooses_the_epoch(data: tuple[list[str], np.ndarray]) -> None:
    paths, y = data
    settings = {**FEW, "epochs": 2, "backbone": Colours(), "fine_tune": 1, "trainable": "all"}
    regressor = er.ImageRegressor(**settings).fit(paths[:60], y[:60], eval_set=(paths[60:], y[60:]))
    assert len(regressor.history_.validation_nll) == 2 and len(regressor.fine_tuning_.validation_nll) == 1
    with pytest.raises(ValueError, match=r"eval_set is a list; expected a pair \(files, y\)"):
        er.ImageRegressor(**settings).fit(paths, y, eval_set=paths)
