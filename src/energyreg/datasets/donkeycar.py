"""Donkeycar tubs: frames of a small car's camera, and what its driver did."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from energyreg.datasets.files import (
    PathLike,
    existing_file,
    existing_folder,
    images_of,
    natural_key,
    numbers,
    read_csv,
    read_text,
)
from energyreg.datasets.tasks import ImageTask

__all__ = ["load_donkeycar"]

SOURCE = "a tub of Donkeycar, https://docs.donkeycar.com"
LICENCE = "that of whoever drove; none is stated in a tub"
IMAGE, ACTIONS = "cam/image_array", ("angle", "throttle")
LIMIT = 1.0
"""Angle and throttle are in [-1, 1]."""


def load_donkeycar(path: PathLike, *, targets: Sequence[str] = ("angle",)) -> ImageTask:
    """Load a Donkeycar tub: version 1 (`record_*.json`), version 2 (`manifest.json`, `catalog_*.catalog`), or a CSV.

    The CSV is `labels.csv` with the columns file, angle, throttle, index and session, and the frames in `images/` or
    beside it. Records that a tub of version 2 marks as deleted are left out, and listed in `skipped`.

    Traps:

    - Frames are a video, about 20 a second: never split them at random. Split by `time` and `groups` with
      :func:`energyreg.datasets.split_by_blocks`, and leave a gap.
    - A steering of exactly 0, 1 or -1 is common (no input, and full lock): these are point masses, where a density has
      no finite value. :func:`energyreg.datasets.atoms` finds them; dequantise, or give each its probability.
    - A driver's reaction comes after the picture that caused it, and a user's recording holds his mistakes.

    Args:
        path: The tub.
        targets: Which of "angle" and "throttle", in this order.

    Returns:
        Frames by session and index, with the angle as the fraction of full lock, in [-1, 1], to the right where
        positive; `groups` is the session, `time` the index of the record.
    """
    wanted = tuple(targets)
    if not wanted or set(wanted) - set(ACTIONS) or len(set(wanted)) < len(wanted):
        raise ValueError(f"targets is {wanted}; expected some of {ACTIONS}, each once.")
    folder = existing_folder(path, "a tub of Donkeycar")
    skipped: list[str] = []
    if (folder / "labels.csv").is_file():
        records = list(_table(folder / "labels.csv", wanted))
    elif (folder / "manifest.json").is_file():
        records = list(_version_2(folder, wanted, skipped))
    else:
        records = list(_version_1(folder, wanted))
    if not records:
        raise ValueError(f"{folder} holds no records that are not deleted; expected a tub of Donkeycar.")
    records.sort(key=lambda record: (record[2], record[3]))
    files, actions, sessions, indices = zip(*records, strict=True)
    return ImageTask(
        files=list(files),
        targets=np.array(actions),
        names=tuple("steering" if name == "angle" else name for name in wanted),
        units=tuple("fraction of full lock" if name == "angle" else "fraction of full throttle" for name in wanted),
        source=SOURCE,
        licence=LICENCE,
        groups=np.array(sessions),
        time=np.array(indices, dtype=np.int64),
        skipped=tuple(skipped),
    )


Record = tuple[Path, list[float], str, int]
"""A frame, its actions, its session and its index."""


def _table(table: Path, wanted: Sequence[str]) -> Iterator[Record]:
    rows = read_csv(table, ["file", *wanted, "index", "session"], "labels of Donkeycar's frames")
    images = images_of(table.parent)
    index = numbers([row["index"] for row in rows], table, "index")
    for number, row in enumerate(rows):
        where = f"{table}, row {number + 1}"
        file = existing_file(images / row["file"], f"a frame that {table} names")
        yield file, [_action(row[name], name, where) for name in wanted], row["session"], int(index[number])


def _version_1(folder: Path, wanted: Sequence[str]) -> Iterator[Record]:
    files = sorted(folder.glob("record_*.json"), key=natural_key)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds neither manifest.json nor record_*.json nor labels.csv; expected a tub of Donkeycar."
        )
    for file in files:
        number = file.stem.removeprefix("record_")
        if not number.isdecimal():
            raise ValueError(f"{file} has no number; expected record_NUMBER.json.")
        record = _json(read_text(file, "a record of Donkeycar"), str(file))
        yield _record(record, str(file), folder, wanted, folder.name, int(number))


def _version_2(folder: Path, wanted: Sequence[str], skipped: list[str]) -> Iterator[Record]:
    manifest = folder / "manifest.json"
    lines = [line for line in read_text(manifest, "the manifest of a tub").splitlines() if line.strip()]
    last = _json(lines[-1], f"{manifest}, line {len(lines)}") if lines else {}
    try:
        catalogs, deleted = [str(name) for name in last["paths"]], {int(index) for index in last["deleted_indexes"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{manifest} is broken: its last line should hold paths and deleted_indexes.") from error
    position = -1
    for name in catalogs:
        for number, line in enumerate(read_text(folder / name, "a catalog of a tub").splitlines(), start=1):
            if not line.strip():
                continue
            where, position = f"{folder / name}, line {number}", position + 1
            record = _json(line, where)
            index = record.get("_index", position)
            if index in deleted:
                skipped.append(f"{where}: marked as deleted")
                continue
            session = str(record.get("_session_id", folder.name))
            yield _record(record, where, folder / "images", wanted, session, index)


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is no JSON ({error}); expected a record of Donkeycar.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: is a {type(content).__name__}; expected a JSON object.")
    return content


def _record(
    record: dict[str, Any], where: str, images: Path, wanted: Sequence[str], session: str, index: int
) -> Record:
    missing = [key for key in (IMAGE, *(f"user/{name}" for name in wanted)) if key not in record]
    if missing:
        raise ValueError(f"{where}: has {sorted(record)}, but not {', '.join(missing)}.")
    # Version 1 may have written the whole path of the computer that it ran on.
    file = existing_file(images / Path(str(record[IMAGE])).name, f"the frame of {where}")
    return file, [_action(record[f"user/{name}"], name, where) for name in wanted], session, index


def _action(value: Any, name: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not abs(number) <= LIMIT:
        raise ValueError(f"{where}: {name} is {value!r}; expected a number in [-1, 1].")
    return number
