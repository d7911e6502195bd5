"""Tasks keep their rows together, and values that repeat are found."""

from pathlib import Path

import numpy as np
import pytest

from energyreg.datasets import ArrayTask, CountTask, ImageTask, atoms


def make(n: int = 5) -> CountTask:
    return CountTask(
        files=[Path(f"{k}.png") for k in range(n)],
        targets=np.arange(n, dtype=float)[:, None],
        names=("cells",),
        units=("cells",),
        source="made",
        licence="none",
        groups=np.array([f"g{k}" for k in range(n)]),
        time=np.arange(n) * 10,
        split=np.array(["train", "test"] * n)[:n],
        dots=[np.zeros((k, 2), dtype=np.int64) for k in range(n)],
    )


@pytest.mark.parametrize("rows", [[3, 0], np.array([3, 0]), np.array([3, 0], dtype=np.uint8)])
def test_a_subset_has_all_fields_of_its_rows_in_order(rows: list[int]) -> None:
    part = make().subset(rows)
    assert isinstance(part, CountTask) and len(part) == 2
    assert [file.name for file in part.files] == ["3.png", "0.png"] and part.targets.tolist() == [[3.0], [0.0]]
    assert part.groups is not None and part.time is not None and part.split is not None
    assert part.groups.tolist() == ["g3", "g0"] and part.time.tolist() == [30, 0]
    assert part.split.tolist() == ["test", "train"] and [len(dots) for dots in part.dots] == [3, 0]
    assert part.source == "made"


def test_a_mask_takes_rows_in_their_order() -> None:
    assert make().subset(np.array([0, 1, 0, 0, 1], dtype=bool)).targets.ravel().tolist() == [1.0, 4.0]
    with pytest.raises(ValueError, match=r"mask of shape \(3,\); expected \(5,\)"):
        make().subset(np.ones(3, dtype=bool))


def test_rows_of_a_part_of_the_split() -> None:
    assert make().rows("test").tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"part is 'validation'; expected one of \['test', 'train'\]"):
        make().rows("validation")
    task = ArrayTask(x=np.zeros((2, 3)), targets=np.zeros((2, 1)), names=("y",), units=("m",), source="", licence="")
    with pytest.raises(ValueError, match=r"no split; use .*split_by_group"):
        task.rows("test")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"targets": np.zeros((3, 1))}, "targets has 3 rows; expected 2"),
        ({"groups": np.array(["a"])}, "groups has 1 rows; expected 2"),
        ({"targets": np.zeros(2)}, r"targets has shape \(2,\)"),
        ({"names": ("y", "z")}, "with a name and a unit"),
        ({"units": ()}, "with a name and a unit"),
    ],
)
def test_a_task_that_does_not_fit_together_is_refused(changes: dict[str, object], problem: str) -> None:
    fields = dict(files=[Path("a"), Path("b")], targets=np.zeros((2, 1)), names=("y",), units=("m",))
    with pytest.raises(ValueError, match=problem):
        ImageTask(**{**fields, "source": "", "licence": "", **changes})  # type: ignore[arg-type]


def test_atoms_are_the_values_that_many_rows_have() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-1, 1, 900), np.zeros(60), np.ones(40)])[:, None]
    assert atoms(values) == {0.0: 0.06, 1.0: 0.04}
    assert atoms(values, share=0.05) == {0.0: 0.06}
    assert atoms(np.array([1.0, 2.0, 3.0])) == {}


@pytest.mark.parametrize("values", [np.zeros((3, 2)), np.zeros(0)])
def test_atoms_of_no_single_target_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected one target"):
        atoms(values)
