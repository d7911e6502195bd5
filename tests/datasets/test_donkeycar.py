"""Tubs of both versions and the table of one give the same task; deleted and broken records are named."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from energyreg.datasets import atoms, load_donkeycar, split_by_blocks

ANGLES, THROTTLES = [0.0, -1.0, 0.25, 1.0, 0.0], [0.4, 0.5, 0.5, 0.3, 0.0]


def frame(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path.name


def version_1(folder: Path) -> Path:
    numbers = [0, 1, 2, 10, 11]
    for number, angle, throttle in zip(numbers, ANGLES, THROTTLES, strict=True):
        name = frame(folder / f"{number}_cam-image_array_.jpg")
        # Some tubs hold the whole path of the car's computer.
        name = f"/home/pi/mycar/data/tub_1/{name}" if number == 2 else name
        record = {"cam/image_array": name, "user/angle": angle, "user/throttle": throttle, "user/mode": "user"}
        (folder / f"record_{number}.json").write_text(json.dumps(record))
    (folder / "meta.json").write_text(json.dumps({"inputs": ["cam/image_array"], "types": ["image_array"]}))
    return folder


def version_2(folder: Path, deleted: tuple[int, ...] = (), indexed: bool = True) -> Path:
    catalogs = [[0, 1, 2], [3, 4]]
    for number, indices in enumerate(catalogs):
        lines = []
        for k in indices:
            name = frame(folder / "images" / f"{k}_cam_image_array_.jpg")
            record = {"cam/image_array": name, "user/angle": ANGLES[k], "user/throttle": THROTTLES[k]}
            if indexed:
                record |= {"_index": k, "_session_id": "21-03-29_0", "_timestamp_ms": 1617000000000 + 50 * k}
            lines.append(json.dumps(record))
        (folder / f"catalog_{number}.catalog").write_text("\r\n".join(lines) + "\r\n", newline="")
        (folder / f"catalog_{number}.catalog_manifest").write_text("{}")
    last = {"paths": ["catalog_0.catalog", "catalog_1.catalog"], "current_index": 5, "max_len": 1000}
    last["deleted_indexes"] = list(deleted)
    content = [["cam/image_array"], ["image_array"], {}, {"created_at": 1.0}, last]
    (folder / "manifest.json").write_text("\r\n".join(map(json.dumps, content)) + "\r\n", newline="")
    return folder


def table(folder: Path) -> Path:
    lines = ["file,angle,throttle,index,session"]
    for k in (2, 0, 1, 4, 3):
        lines.append(f"{frame(folder / 'images' / f'{k}.jpg')},{ANGLES[k]},{THROTTLES[k]},{k},a")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("make", [version_1, version_2, table])
def test_every_layout_gives_the_frames_in_order(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    task = load_donkeycar(make(tmp_path))
    assert task.targets.ravel().tolist() == ANGLES and task.names == ("steering",)
    assert all(file.is_file() for file in task.files) and task.time is not None and task.groups is not None
    assert task.time.tolist() == ([0, 1, 2, 10, 11] if make is version_1 else [0, 1, 2, 3, 4])
    assert len(set(task.groups.tolist())) == 1
    both = load_donkeycar(tmp_path, targets=("throttle", "angle"))
    assert np.array_equal(both.targets, np.stack([THROTTLES, ANGLES], axis=1))
    assert both.names == ("throttle", "steering")


@pytest.mark.parametrize("indexed", [True, False])
def test_deleted_records_are_left_out(tmp_path: Path, indexed: bool) -> None:
    task = load_donkeycar(version_2(tmp_path, deleted=(1, 4), indexed=indexed))
    assert task.targets.ravel().tolist() == [0.0, 0.25, 1.0] and task.time is not None
    assert task.time.tolist() == [0, 2, 3]
    assert [line.split("/")[-1] for line in task.skipped] == [
        "catalog_0.catalog, line 2: marked as deleted",
        "catalog_1.catalog, line 2: marked as deleted",
    ]
    with pytest.raises(ValueError, match="holds no records that are not deleted"):
        load_donkeycar(version_2(tmp_path, deleted=(0, 1, 2, 3, 4)))


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"user/angle": 1.5}, ValueError, "angle is 1.5; expected a number in"),
        ({"user/angle": "left"}, ValueError, "angle is 'left'"),
        ({"user/angle": None}, ValueError, "angle is None"),
        ({"user/angle": float("nan")}, ValueError, "angle is nan"),
        ({"cam/image_array": "gone.jpg"}, FileNotFoundError, r"gone\.jpg does not exist; expected the frame of"),
    ],
)
def test_a_broken_record_is_named(
    tmp_path: Path, change: dict[str, object], error: type[Exception], problem: str
) -> None:
    path = version_1(tmp_path / "one") / "record_10.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=rf"({problem}.*)?record_10\.json(.*{problem})?") as caught:
        load_donkeycar(tmp_path / "one")
    assert caught.match(problem)
    path = version_2(tmp_path / "two") / "catalog_1.catalog"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    path.write_text("\n".join(lines))
    with pytest.raises(error, match=problem) as caught:
        load_donkeycar(tmp_path / "two")
    assert caught.match(r"catalog_1\.catalog, line 2")


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither manifest\.json nor record_\*\.json nor labels\.csv"):
        load_donkeycar(tmp_path)
    one = version_1(tmp_path / "one")
    (one / "record_1.json").write_text('{"cam/image_array"')
    with pytest.raises(ValueError, match=r"record_1\.json: is no JSON"):
        load_donkeycar(one)
    (one / "record_1.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"record_1\.json: is a list; expected a JSON object"):
        load_donkeycar(one)
    (one / "record_1.json").write_text('{"user/angle": 0}')
    with pytest.raises(ValueError, match=r"record_1\.json: has \['user/angle'\], but not cam/image_array"):
        load_donkeycar(one)
    two = version_2(tmp_path / "two")
    (two / "catalog_1.catalog").unlink()
    with pytest.raises(FileNotFoundError, match=r"catalog_1\.catalog does not exist"):
        load_donkeycar(two)
    for text in ("", "[]\n{}\n"):
        (two / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json is broken"):
            load_donkeycar(two)
    with pytest.raises(ValueError, match=r"targets is \('speed',\); expected some of"):
        load_donkeycar(one, targets=("speed",))


def test_the_real_drive_has_atoms_and_splits_by_blocks(real: Callable[[str], Path]) -> None:
    task = load_donkeycar(real("steering/donkey_lab"))
    assert len(task) == 5015 and task.time is not None and task.time.tolist() == list(range(5015))
    found = atoms(task.targets)
    assert list(found) == [-1.0, 0.0, 1.0] and found[0.0] > 0.5 and min(found.values()) > 0.07
    train, test = split_by_blocks(task.time, 200, gap=20, groups=task.groups)
    assert np.abs(train[:, None] - test).min() > 20 and len(train) > 3500 and len(test) > 700
