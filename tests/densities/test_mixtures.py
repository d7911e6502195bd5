"""The cdf of Gaussian mixtures and its inverse, against closed forms and finite differences."""

import pytest
import torch

from energyreg.densities.bases import Marginal, ProposalReference
from energyreg.densities.mixtures import GaussianMixture, MixtureReference

DOUBLE = torch.float64
LEVELS = torch.tensor([0.0, 1e-300, 1e-12, 0.003, 0.25, 0.4999, 0.5, 0.9, 1 - 1e-9, 1.0], dtype=DOUBLE)[:, None, None]


def mixtures(periodic: bool = False) -> GaussianMixture:
    """One component; two far apart, so that the cdf is flat between them; two of very different scales; one tiny."""
    logits = torch.tensor([[0.0, -200.0], [0.0, 0.0], [3.0, 0.0], [0.0, -30.0]], dtype=DOUBLE)
    means = torch.tensor([[0.7, 0.0], [-2.0, 2.0], [0.1, 0.0], [1.0, -3.0]], dtype=DOUBLE)[..., None]
    scales = torch.tensor([[0.3, 1.0], [0.01, 0.02], [1e-6, 2.0], [0.5, 0.1]], dtype=DOUBLE)[..., None]
    return GaussianMixture(logits, means, scales, periodic=[periodic])


def test_the_quantile_of_one_gaussian_is_that_of_the_closed_form():
    levels = LEVELS[1:-1]
    expected = 0.7 + 0.3 * torch.special.ndtri(levels[:, 0, 0])
    torch.testing.assert_close(mixtures().icdf(levels)[:, 0, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("periodic", [False, True])
def test_the_cdf_of_a_quantile_is_its_level(periodic):
    q = mixtures(periodic)
    y = q.icdf(LEVELS)
    assert y.shape == (len(LEVELS), 4, 1) and y.isfinite().all()
    # Of a spike the level is known as well as its place is, to a few units in the last place.
    error = (q.cdf(y) - LEVELS[..., 0]).abs()
    assert (error <= 1e-12 + 1e-15 * q.log_prob(y).exp()).all()
    assert (y.diff(dim=0) >= 0).all()


def test_quantiles_of_single_precision_levels_are_those_of_double_precision():
    q = mixtures()
    single = GaussianMixture(q.log_mixing.float(), q.means.float(), q.scales.float())
    u = torch.linspace(0.001, 0.999, 50)[:, None, None]
    torch.testing.assert_close(single.icdf(u)[:, 0], q.icdf(u)[:, 0], rtol=1e-6, atol=1e-6)


def test_the_slope_of_the_unit_coordinate_is_the_density():
    reference = MixtureReference(mixtures()[torch.tensor([1, 3, 1])])
    z = torch.tensor([[-2.01], [0.4], [2.0]], dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(reference.to_unit(z).sum(), z)
    torch.testing.assert_close(slope[:, 0], reference.log_prob(z).exp())


def test_what_has_no_cdf_is_refused():
    wide = GaussianMixture(torch.zeros(2, 3), torch.zeros(2, 3, 2), torch.ones(2, 3, 2))
    with pytest.raises(ValueError, match="one dimension"):
        MixtureReference(wide)
    with pytest.raises(ValueError, match="reference has 2 dimensions"):
        ProposalReference(Marginal(2))
    with pytest.raises(NotImplementedError, match="one dimension"):
        wide.icdf(torch.full((1, 1, 1), 0.5))
