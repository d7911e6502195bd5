"""Out-of-fold likelihood: what members say of rows that they were not trained on, and the weights that follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OutOfFold"]

STEPS, TOLERANCE = 10_000, 1e-7
"""Steps of the search for weights at most, and the change of a weight at which it ends."""


@dataclass(frozen=True, eq=False)
class OutOfFold:
    r"""Log-densities of N rows by the members of an ensemble, n of them, that have not been trained on these rows.

    Members may be of any kind, and each may have held out other rows. O_i are those that have not seen row i. Their
    mixture is the only density of the row that is honest,

    .. math:: p_{-i}(y_i|x_i) = \sum_{s \in O_i} w_s \, p_s(y_i|x_i) \Big/ \sum_{s \in O_i} w_s

    and that of a smaller ensemble than the one that predicts, so rather too low.

    Args:
        log_density: log p_s(y_i|x_i), in nats, shape (n, N). What a member says of rows that it has seen is not read.
        unseen: Which member has not been trained on which row, shape (n, N); by default none on any.
        sample_weight: How many rows each stands for, shape (N,); 1 by default.

    Raises:
        ValueError: If shapes differ, a weight is below 0, a log-density that is read is NaN or +inf, or a row has been
            seen by all members.

    >>> log_density = torch.tensor([[-1.0, -1.0, -3.0], [-2.0, -2.0, -1.0]])
    >>> rows = OutOfFold(log_density, unseen=torch.tensor([[True, True, False], [True, False, True]]))
    >>> [round(weight, 3) for weight in rows.weights(prior=2.0)]
    [0.601, 0.399]
    >>> rows.log_likelihood().shape
    torch.Size([3])
    """

    log_density: Tensor
    unseen: Tensor | None = None
    sample_weight: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes and values, and fill in what is left out."""
        log_density = torch.as_tensor(self.log_density).detach().double()
        if log_density.ndim != 2 or 0 in log_density.shape:
            raise ValueError(f"log_density has shape {tuple(log_density.shape)}; expected (members, rows).")
        unseen = torch.ones_like(log_density, dtype=torch.bool)
        if self.unseen is not None:
            unseen = torch.as_tensor(self.unseen, device=log_density.device)
        if unseen.shape != log_density.shape or unseen.dtype != torch.bool:
            raise ValueError(
                f"unseen has shape {tuple(unseen.shape)} and dtype {unseen.dtype}; expected "
                f"{tuple(log_density.shape)} and torch.bool, as of log_density."
            )
        if not bool(unseen.any(0).all()):
            row = int((~unseen.any(0)).nonzero()[0])
            raise ValueError(f"unseen is False for all members in row {row}; expected a member that has not seen it.")
        wrong = unseen & (log_density.isnan() | (log_density == math.inf))
        if bool(wrong.any()):
            member, row = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"log_density is {float(log_density[member, row])} of member {member} in row {row}; expected a finite "
                "number or -inf."
            )
        count = log_density.shape[1]
        weight = log_density.new_ones(count)
        if self.sample_weight is not None:
            weight = torch.as_tensor(self.sample_weight).to(log_density)
        if weight.shape != (count,) or not bool((weight >= 0).all()) or not bool(weight.isfinite().all()):
            raise ValueError(f"sample_weight has shape {tuple(weight.shape)}; expected {(count,)} finite numbers ≥ 0.")
        object.__setattr__(self, "log_density", log_density.masked_fill(~unseen, -math.inf))
        object.__setattr__(self, "unseen", unseen)
        object.__setattr__(self, "sample_weight", weight)

    def weights(self, kinds: Sequence[int] | None = None, prior: float = 20.0) -> list[float]:
        r"""The members' weights in the mixture that is the most likely out of fold.

        .. math:: \max_w \sum_i r_i \log p_{-i}(y_i|x_i) + \frac{a}{n} \sum_s \log w_s

        where r are the rows' weights. By minorisation and maximisation: each step raises it; where all members have
        held out the same rows the problem is concave, and this is expectation maximisation. With few rows the weights
        stay near equal ones.

        Args:
            kinds: Kind of each member, n numbers: members of one kind get one weight. Without them, the weights of
                members that have no row in common are compared by the prior only. So where members of each kind have
                held out the same rows, kinds are compared on all rows.
            prior: How many rows the equal weights count as, a.

        Returns:
            n numbers > 0 that sum to 1.

        Raises:
            ValueError: If an argument cannot be used.

        Source:
            Smyth and Wolpert, "Linearly combining density estimators via stacking", Machine Learning 1999; where only
            some members have not seen a row, the denominators are those of Hunter, "MM algorithms for generalized
            Bradley-Terry models", Annals of Statistics 2004.
        """
        assert self.unseen is not None and self.sample_weight is not None
        count = len(self.log_density)
        if not (isinstance(prior, (int, float)) and math.isfinite(prior) and prior > 0):
            raise ValueError(f"prior is {prior!r}; expected a number of rows > 0.")
        kinds = list(range(count)) if kinds is None else list(kinds)
        if len(kinds) != count:
            raise ValueError(f"kinds has {len(kinds)} entries; expected {count}, one for each member.")
        tied = self.log_density.new_tensor([[a == b for b in kinds] for a in kinds])
        # A row that no member thinks possible says nothing about which is best.
        known = (self.log_density > -math.inf).any(0)
        log_p, unseen, rows = self.log_density[:, known], self.unseen[:, known], self.sample_weight[known]
        shown = unseen.to(log_p)
        weights = log_p.new_full((count,), 1 / count)
        for _ in range(STEPS):
            before = weights
            responsible = (log_p + weights.log()[:, None]).softmax(0)
            claimed = responsible @ rows + prior / count
            offered = shown @ (rows / (weights @ shown)) + prior
            weights = (tied @ claimed) / (tied @ offered)
            weights = weights / weights.sum()
            if bool((weights - before).abs().max() < TOLERANCE):
                break
        return weights.tolist()

    def log_likelihood(self, weights: Sequence[float] | None = None) -> Tensor:
        """Log-density of each row by the mixture of the members that have not seen it, in nats, shape (N,).

        Args:
            weights: The members' weights; equal by default.
        """
        assert self.unseen is not None
        count = len(self.log_density)
        share = self.log_density.new_full((count,), 1 / count) if weights is None else torch.tensor(weights).double()
        log_share = share.to(self.log_density).log()[:, None].expand_as(self.log_density)
        total = log_share.masked_fill(~self.unseen, -math.inf).logsumexp(0)
        return (self.log_density + log_share).logsumexp(0) - total
