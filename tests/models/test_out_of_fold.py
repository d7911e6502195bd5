"""Weights by out-of-fold likelihood are its maximum, whoever has held out which rows."""

import math

import numpy as np
import pytest
import torch

from energyreg.models.out_of_fold import OutOfFold

MEMBERS, ROWS = 4, 400


def normals(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    """Log-densities of standard normal targets by normal members: right, shifted, flat and sharp."""
    y = np.random.default_rng(seed).normal(size=rows)
    means, scales = np.array([0.0, 1.0, 0.0, 0.0]), np.array([1.0, 1.0, 2.0, 0.5])
    z = (y - means[:, None]) / scales[:, None]
    return torch.from_numpy(-(z**2) / 2 - np.log(scales)[:, None] - math.log(2 * math.pi) / 2)


def halves(rows: int = ROWS) -> torch.Tensor:
    """Members 0 and 1 have held out the first half, members 2 and 3 the second, shape (4, rows)."""
    first = torch.arange(rows) < rows // 2
    return torch.stack([first, first, ~first, ~first])


def penalised(rows: OutOfFold, weights: list[float], prior: float) -> float:
    total = float((rows.sample_weight * rows.log_likelihood(weights)).sum())
    return total + prior / len(weights) * float(np.log(weights).sum())


@pytest.mark.parametrize("kinds", [None, [0, 1, 0, 1]])
@pytest.mark.parametrize("folds", ["one", "two"])
def test_no_other_weights_are_better(folds, kinds):
    """Against 300 others nearby that sum to 1, tied where kinds are; the search ends within 1e-7 of a maximum."""
    rng = np.random.default_rng(1)
    weight = torch.from_numpy(rng.uniform(0, 2, ROWS))
    rows = OutOfFold(normals(), None if folds == "one" else halves(), weight)
    best = rows.weights(kinds, prior=5.0)
    assert sum(best) == pytest.approx(1) and (kinds is None or best[0] == best[2] != best[1] == best[3])
    for size in (0.3, 0.03, 0.003):
        for _ in range(100):
            step = np.exp(size * rng.normal(size=MEMBERS if kinds is None else 2))
            other = np.array(best) * (step if kinds is None else step[kinds])
            assert penalised(rows, list(other / other.sum()), 5.0) <= penalised(rows, best, 5.0) + 1e-6


def test_what_a_member_has_seen_is_not_read():
    log_density, unseen = normals(), halves()
    told = torch.where(unseen, log_density, torch.nan)
    assert OutOfFold(told, unseen).weights() == OutOfFold(log_density, unseen).weights()
    pair = OutOfFold(log_density[:2, :200])
    torch.testing.assert_close(OutOfFold(told, unseen).log_likelihood()[:200], pair.log_likelihood())


def test_kinds_compare_members_that_share_no_row():
    """A network and a tree for each of two folds: the better kind wins on all rows, to which the folds' levels do not
    matter; the members of one kind differ by chance only, and get one weight."""
    level = torch.where(torch.arange(ROWS) < ROWS // 2, 0.0, -3.0)  # the second fold is harder for all
    network, tree = normals()[0] + level, normals()[2] + level - 0.5
    rows = OutOfFold(torch.stack([network, tree, network, tree]), halves())
    tied = rows.weights([0, 1, 0, 1])
    alone = OutOfFold(torch.stack([network, tree])).weights()
    assert tied == pytest.approx([alone[0] / 2, alone[1] / 2] * 2, abs=1e-5)
    assert tied[0] > 0.4


def test_few_rows_change_little_and_impossible_ones_nothing():
    rows = OutOfFold(normals(rows=3))
    assert max(rows.weights()) < 0.33
    impossible = torch.cat([normals(), torch.full((MEMBERS, 5), -torch.inf)], 1)
    assert OutOfFold(impossible).weights() == pytest.approx(OutOfFold(normals()).weights())
    assert OutOfFold(impossible).log_likelihood()[-5:].tolist() == [-math.inf] * 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OutOfFold(torch.zeros(3)), r"log_density has shape \(3,\)"),
        (lambda: OutOfFold(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool)), r"unseen has shape \(2, 2\)"),
        (lambda: OutOfFold(torch.zeros(2, 3), torch.ones(2, 3)), r"dtype torch.float32"),
        (lambda: OutOfFold(torch.zeros(2, 3), torch.eye(2, 3) > 0), "unseen is False for all members in row 2"),
        (lambda: OutOfFold(torch.tensor([[0.0, math.nan]])), "log_density is nan of member 0 in row 1"),
        (lambda: OutOfFold(torch.zeros(2, 3), sample_weight=torch.ones(2)), r"sample_weight has shape \(2,\)"),
        (lambda: OutOfFold(torch.zeros(2, 3)).weights([0]), "kinds has 1 entries; expected 2"),
        (lambda: OutOfFold(torch.zeros(2, 3)).weights(prior=0), "prior is 0"),
    ],
)
def test_a_bad_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
