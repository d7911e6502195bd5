"""A file of an estimator is data: whatever it says, it is refused by name, or works."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import safetensors.torch
import torch

import energyreg as er
from energyreg import files
from energyreg.cli import model_file
from energyreg.errors import DataError
from energyreg.estimators.image import load_estimator
from energyreg.models import checkpoint

RNG = np.random.default_rng(0)
TABLE = pandas.DataFrame(
    {
        "size": np.where(RNG.random(80) < 0.1, np.nan, RNG.normal(size=80)),
        "colour": RNG.choice(["red", "green"], 80),
        "day": pandas.date_range("2026-01-01", periods=80, freq="31h"),
    }
)
WRONG: list[Any] = [
    None, "x", -1, 0, 3, 10**9, 10**400, 0.5, -1e308, {"float": "nan"}, {"float": "inf"}, [], {}, True, [[1]],
    {"dict": {}}, {"tuple": []}, {"same": 0}, {"class": "Real", "id": 99, "args": {"dim": 10**9}},
]  # fmt: skip
DELETED = "deleted"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"n_members": 2, "epochs": 1, "width": 8, "depth": 1, "random_state": 0, "num_components": 2}
    settings["split"] = "random"
    regressor = er.EnergyRegressor(conformal=True, target="positive", base="proposal", min_count=1, **settings)
    regressor.fit(TABLE, 1 + RNG.random(80))
    return regressor.save(tmp_path_factory.mktemp("model") / "model")


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All fields of a description; of lists the first entry stands for the others."""
    if at:
        yield at
    for key, value in (
        node.items() if isinstance(node, dict) else list(enumerate(node))[:1] if isinstance(node, list) else ()
    ):
        yield from places(value, (*at, key))


def forged(path: Path, source: Path, part: str, at: tuple[Any, ...], value: Any) -> Path:
    """A file with another value at a place of its description, signed again."""
    metadata = files.read_tensors(source, files.ESTIMATOR)[1]
    tensors = safetensors.torch.load(source.read_bytes())
    document = json.loads(metadata[part])
    node = document
    for key in at[:-1]:
        node = node[key]
    if value is DELETED:
        del node[at[-1]]
    else:
        node[at[-1]] = value
    metadata[part] = json.dumps(document)
    metadata["sha256"] = files.digest(tensors, metadata)
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    return path


def fields(source: Path) -> list[tuple[str, tuple[Any, ...]]]:
    metadata = files.read_tensors(source, files.ESTIMATOR)[1]
    return [(part, at) for part in ("config", "state") for at in places(json.loads(metadata[part]))]


def check_all(source: Path, folder: Path, cases: list[tuple[str, tuple[Any, ...], Any]]) -> int:
    """How many files are refused; all others must predict finite numbers."""
    refused = 0
    for part, at, value in cases:
        path = forged(folder / "forged.safetensors", source, part, at, value)
        try:
            regressor = load_estimator(path)[0]
        except er.CheckpointError as error:
            assert str(path) in str(error), (at, value)
            refused += 1
            continue
        try:
            answers = [regressor.predict(TABLE[:2], "median"), regressor.predict_interval(TABLE[:2], 0.5)]
        except DataError:  # the table has not the columns, or kinds of columns, that the file says
            continue
        assert all(np.isfinite(answer).all() for answer in answers), (part, at, value)
    return refused


def test_any_wrong_value_in_a_file_is_refused_or_works(saved: Path, tmp_path: Path) -> None:
    """A few of the fields and values; the slow test has all of them."""
    found = fields(saved)
    cases = [
        (*place, WRONG[(7 * number + shift) % len(WRONG)]) for number, place in enumerate(found) for shift in (0, 9)
    ]
    chosen = [*cases[::12], *((*place, DELETED) for place in found[::9])]
    assert check_all(saved, tmp_path, chosen) > len(chosen) / 2


@pytest.mark.slow
def test_every_wrong_value_in_a_file_is_refused_or_works(saved: Path, tmp_path: Path) -> None:
    check_all(saved, tmp_path, [(*place, value) for place in fields(saved) for value in (*WRONG, DELETED)])


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (("dict", "n_outputs"), "one", r"state\['n_outputs'\] is 'one'; expected int"),
        (("dict", "n_outputs"), 10**9, "n_outputs is 1000000000, but the model has 1"),
        (("dict", "n_features"), 2, "n_features contradicts the rest"),
        (("dict", "histories"), DELETED, "state has no 'histories'"),
        (("dict", "calibration", 0), -1.0, "inverse_temperature is -1.0"),
        (("dict", "parameters", "dict", "epochs"), "many", "epochs is 'many'"),
        (("dict", "parameters", "dict", "surprise"), 1, "surprise"),
        (("dict", "parameters", "dict", "device"), "meta", "device is 'meta'; expected one of cpu"),
        (("dict", "preprocessor", "dict", "plans", 0, "dict", "kind"), "noise", "a column is described by"),
        (("dict", "preprocessor", "dict", "plans", 0, "dict", "numbers"), [], "cannot be read"),
    ],
)  # fmt: skip
def test_the_error_names_the_field(saved: Path, tmp_path: Path, at: tuple[Any, ...], value: Any, message: str) -> None:
    path = forged(tmp_path / "forged.safetensors", saved, "state", at, value)
    for load in (load_estimator, er.EnergyRegressor.load):
        with pytest.raises(er.CheckpointError, match=message):
            load(path)


def test_where_a_device_is_missing_a_model_runs_on_the_cpu(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.empty

    def without_cuda(*arguments: Any, **more: Any) -> torch.Tensor:
        if "cuda" in str(more.get("device")):
            raise AssertionError("Torch not compiled with CUDA enabled")
        return real(*arguments, **more)

    monkeypatch.setattr(torch, "empty", without_cuda)
    path = forged(tmp_path / "forged.safetensors", saved, "state", ("dict", "parameters", "dict", "device"), "cuda")
    with pytest.warns(UserWarning, match=r"device='cuda', which cannot be used here .*; it runs on the CPU"):
        regressor = load_estimator(path)[0]
    assert regressor.model_.device.type == "cpu"


def test_places_in_a_file_of_images_are_not_believed(tmp_path: Path) -> None:
    """A cache that a file names would be made and written by the next prediction."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("timm")
    paths = []
    for number in range(12):
        paths.append(tmp_path / f"{number}.png")
        image.new("RGB", (8, 8), (20 * number,) * 3).save(paths[-1])
    settings = {"n_members": 1, "epochs": 1, "width": 8, "depth": 1, "image_size": 32, "weights": None}
    regressor = er.ImageRegressor(backbone="timm:test_resnet", cache=tmp_path / "cache", **settings)
    source = regressor.fit(paths, np.arange(12)).save(tmp_path / "model")
    assert b'cache\\": null' in source.read_bytes()
    for name in ("cache", "checkpoint_dir", "folder", "weights", "augment"):
        at = ("dict", "parameters", "dict", name)
        path = forged(tmp_path / "forged.safetensors", source, "state", at, str(tmp_path / "elsewhere"))
        loaded = load_estimator(path)[0]
        assert getattr(loaded, name) is None
        np.testing.assert_allclose(loaded.predict(paths), regressor.predict(paths), rtol=1e-5)
    assert not (tmp_path / "elsewhere").exists()


def test_facts_of_the_command_line_are_checked(saved: Path, tmp_path: Path) -> None:
    model, state = checkpoint.load_estimator(saved)
    for facts in ({"targets": 3}, {"notes": [1]}, [1]):
        path = checkpoint.save_estimator(model, state | {"table": facts}, tmp_path / "model")
        with pytest.raises(er.CheckpointError, match=r"model\.safetensors.*table"):
            model_file.load(path)
