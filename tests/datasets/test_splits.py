"""Splits are partitions that keep blocks and groups together, with gaps where they are asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energyreg.datasets import split_by_blocks, split_by_group


@settings(deadline=None, max_examples=60)
@given(
    groups=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60),
    parts=st.sampled_from([(0.8, 0.2), (0.7, 0.1, 0.2), (0.25, 0.25, 0.25, 0.25)]),
    seed=st.integers(0, 1000),
)
def test_no_group_is_in_two_parts(groups: list[str], parts: tuple[float, ...], seed: int) -> None:
    if len(set(groups)) < len(parts):
        with pytest.raises(ValueError, match=f"for {len(parts)} parts"):
            split_by_group(groups, fractions=parts, seed=seed)
        return
    split = split_by_group(groups, fractions=parts, seed=seed)
    assert sorted(np.concatenate(split).tolist()) == list(range(len(groups)))
    found = [{groups[row] for row in rows} for rows in split]
    assert all(found) and sum(map(len, found)) == len(set(groups))


def test_fractions_are_of_the_groups() -> None:
    groups = np.repeat([f"g{k:02d}" for k in range(50)], 3)
    train, validation, test = split_by_group(groups, fractions=(0.7, 0.1, 0.2), seed=3)
    assert (len(train), len(validation), len(test)) == (105, 15, 30)


def test_a_split_depends_on_its_seed_only() -> None:
    groups = [f"g{k}" for k in range(40)]
    one, again, other = (split_by_group(groups, seed=seed)[1].tolist() for seed in (0, 0, 1))
    assert one == again != other
    # PCG64's raw output never changes, so neither may the split.
    assert one == [2, 7, 8, 13, 17, 23, 32, 33]


def test_a_row_without_a_group_is_named() -> None:
    with pytest.raises(ValueError, match="groups is empty in 2 rows, the first of which is row 1"):
        split_by_group(["a", "", "b", ""])


@pytest.mark.parametrize("fractions", [(1.0,), (0.5, 0.4), (1.2, -0.2), (1.0, 0.0)])
def test_fractions_that_are_no_shares_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"fractions is .* that sum to 1"):
        split_by_group(["a", "b", "c"], fractions=fractions)


@settings(deadline=None, max_examples=60)
@given(
    time=st.lists(st.integers(0, 400), min_size=1, max_size=80),
    gap=st.sampled_from([0, 1, 3, 10]),
    num_groups=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_blocks_are_whole_and_gaps_are_kept(time: list[int], gap: int, num_groups: int, seed: int) -> None:
    moments = np.array(time)
    groups = np.array([f"g{k % num_groups}" for k in range(len(time))])
    try:
        train, test = split_by_blocks(moments, 50, fractions=(0.6, 0.4), gap=gap, groups=groups, seed=seed)
    except ValueError as error:
        assert "blocks of time for 2 parts" in str(error) or "leaves part" in str(error)
        return
    start = {g: moments[groups == g].min() for g in set(groups)}
    block = [(g, int((t - start[g]) // 50)) for g, t in zip(groups, moments, strict=True)]
    assert not {block[row] for row in train} & {block[row] for row in test}
    # By definition, in O(N²): the rows that are left out are those near a row of a block of the other part.
    same = groups[:, None] == groups[None]
    near = np.abs(moments[:, None] - moments[None]) <= gap
    part = {block[row]: 0 for row in train} | {block[row]: 1 for row in test}
    distance_ok = same[np.ix_(train, test)] & near[np.ix_(train, test)]
    assert gap == 0 or not distance_ok.any()
    if len(part) == len(set(block)):  # the part of every block is known
        label = np.array([part[b] for b in block])
        out = (same & near & (label[:, None] != label[None])).any(axis=1) if gap else np.zeros(len(time), dtype=bool)
        assert sorted([*train, *test]) == np.flatnonzero(~out).tolist()


def test_a_gap_leaves_out_the_rows_up_to_it_on_both_sides() -> None:
    first, second = split_by_blocks(np.arange(200), 100, fractions=(0.5, 0.5), gap=5)
    # The last row of the first block is 99, the first of the second 100: 95 to 104 are within 5 of the other side.
    assert sorted([first.tolist(), second.tolist()]) == [list(range(95)), list(range(105, 200))]


def test_time_need_not_be_sorted() -> None:
    order = np.random.default_rng(0).permutation(300)
    straight = split_by_blocks(np.arange(300), 20, gap=2, seed=4)
    mixed = split_by_blocks(order, 20, gap=2, seed=4)
    assert [sorted(order[rows].tolist()) for rows in mixed] == [rows.tolist() for rows in straight]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"time": [0.0, np.nan], "block": 1}, "expected finite times"),
        ({"time": [[0.0]], "block": 1}, r"time has shape \(1, 1\)"),
        ({"time": [], "block": 1}, r"time has shape \(0,\)"),
        ({"time": [0, 1], "block": 0}, "block is 0"),
        ({"time": [0, 1], "block": 1, "gap": -1}, "gap is -1"),
        ({"time": [0, 1], "block": 5}, "there are 1 blocks of time for 2 parts"),
        ({"time": [0, 1], "block": 1, "groups": ["a"]}, r"groups has shape \(1,\); expected \(2,\)"),
        ({"time": [0, 1], "block": 1, "gap": 3}, "leaves part 0 without rows"),
    ],
)
def test_what_cannot_be_split_is_named(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        split_by_blocks(**arguments)  # type: ignore[arg-type]
