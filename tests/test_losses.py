"""Laws of the losses: numbers by hand, invariances, gradients, extreme scores."""

import math

import pytest
import torch
from torch import Tensor

from energyreg import losses


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_nce_by_hand() -> None:
    # f - log q is 1 at the target and 0, 2 at the noise.
    loss = losses.nce(
        torch.tensor([3.0]), torch.tensor([[1.0], [1.0]]), torch.tensor([2.0]), torch.tensor([[1.0], [-1.0]])
    )
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 1 + math.e**2)), rel=1e-6)


def test_maximum_likelihood_by_hand() -> None:
    log_weights = torch.tensor([0.5, 1.5, 2.0]).log()[:, None]  # Z = 4
    loss = losses.maximum_likelihood_quadrature(torch.tensor([1.0]), log_weights)
    assert loss.item() == pytest.approx(math.log(4) - 1, abs=1e-6)
    # exp(f) / q is 2, 6, 1 with mean 3.
    f_samples, log_q = torch.tensor([1.0, 3.0, 4.0]).log()[:, None], torch.tensor([0.5, 0.5, 4.0]).log()[:, None]
    loss = losses.maximum_likelihood_importance_sampling(torch.tensor([1.0]), f_samples, log_q)
    assert loss.item() == pytest.approx(math.log(3) - 1, abs=1e-6)
    assert losses.proposal_kl(f_samples, log_q).item() == pytest.approx(math.log(3), rel=1e-6)
    assert losses.proposal_nll(torch.tensor([-2.0, 1.0])).tolist() == [2.0, -1.0]


@pytest.mark.parametrize("num_samples", [1, 7, 1000])
def test_nce_of_a_model_that_cannot_tell_is_log_of_m_plus_one(num_samples: int) -> None:
    log_q_target, log_q_noise = _randn(4), _randn(num_samples, 4, seed=1)
    for constant in (0.0, -50.0, 1e4):
        loss = losses.nce(log_q_target + constant, log_q_noise + constant, log_q_target, log_q_noise)
        # 1e4 + x keeps x to 2e-12.
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(num_samples + 1)), rtol=0, atol=1e-10)


def test_nce_is_never_negative() -> None:
    assert (
        losses.nce(10 * _randn(500), 10 * _randn(3, 500, seed=1), _randn(500, seed=2), _randn(3, 500, seed=3)) >= 0
    ).all()


def test_losses_of_the_energy_do_not_change_with_its_constant() -> None:
    f, f_samples, log_q, log_q_samples = _randn(5), _randn(9, 5, seed=1), _randn(5, seed=2), _randn(9, 5, seed=3)
    for shift in (3.0, -200.0):
        for loss in (
            lambda c: losses.nce(f + c, f_samples + c, log_q, log_q_samples),
            lambda c: losses.maximum_likelihood_importance_sampling(f + c, f_samples + c, log_q_samples),
            lambda c: losses.maximum_likelihood_quadrature(f + c, f_samples + c),
        ):
            torch.testing.assert_close(loss(shift), loss(0.0), rtol=0, atol=1e-11)


def test_importance_sampling_with_the_right_proposal_has_no_error() -> None:
    log_q, log_q_samples = _randn(5), _randn(9, 5, seed=1)
    loss = losses.maximum_likelihood_importance_sampling(log_q + 4, log_q_samples + 4, log_q_samples)
    torch.testing.assert_close(loss, -log_q)


def test_importance_sampling_is_biased_low_by_half_the_relative_variance() -> None:
    # Log-normal weights with mean 1 and variance v = exp(s²) - 1. The mean of log(1/M Σ w) is -v / 2M + O(1 / M²).
    # Here v / 2M is 0.00284, the next term is below 2e-4, and the mean over 100,000 rows has a standard error of
    # 2.4e-4: four of these, and 2e-4.
    s, num_samples = 0.5, 50
    log_weights = s * _randn(num_samples, 100_000) - s**2 / 2
    zero = torch.zeros(100_000, dtype=torch.float64)
    loss = losses.maximum_likelihood_importance_sampling(zero, log_weights, torch.zeros_like(log_weights))
    assert loss.mean().item() == pytest.approx(-math.expm1(s**2) / (2 * num_samples), abs=1.2e-3)
    assert loss.mean() < 0


@pytest.mark.parametrize("target", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("noise", [(-1e4, 1e4), (1e4, 1e4), (-1e4, -1e4), (0.0, -math.inf)])
def test_extreme_scores_stay_finite_in_single_precision(target: float, noise: tuple[float, float]) -> None:
    f = torch.tensor([target], requires_grad=True)
    f_noise = torch.tensor(noise)[:, None].requires_grad_()
    log_q, log_q_noise = torch.tensor([-3.0]), torch.full((2, 1), -3.0, requires_grad=True)
    values = [
        losses.nce(f, f_noise, log_q, log_q_noise),
        losses.maximum_likelihood_importance_sampling(f, f_noise, log_q_noise),
        losses.maximum_likelihood_quadrature(f, f_noise),
        losses.proposal_kl(f_noise, log_q_noise),
    ]
    for value in values:
        assert value.isfinite().all()
        gradients = torch.autograd.grad(value.sum(), (f, f_noise, log_q_noise), allow_unused=True)
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def test_nce_where_every_noise_sample_is_impossible() -> None:
    f, f_noise = torch.zeros(1, requires_grad=True), torch.full((3, 1), -math.inf)
    loss = losses.nce(f, f_noise, torch.zeros(1), torch.zeros(3, 1))
    (gradient,) = torch.autograd.grad(loss.sum(), f)
    assert loss.item() == 0
    assert gradient.item() == 0


def test_gradients_against_finite_differences() -> None:
    f, f_samples = _randn(3).requires_grad_(), _randn(6, 3, seed=1).requires_grad_()
    log_q, log_q_samples = _randn(3, seed=2).requires_grad_(), _randn(6, 3, seed=3).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(losses.nce, (f, f_samples, log_q, log_q_samples))
    assert check(losses.maximum_likelihood_quadrature, (f, f_samples))
    assert check(losses.maximum_likelihood_importance_sampling, (f, f_samples, log_q_samples))
    assert check(lambda q: losses.proposal_kl(f_samples.detach(), q), (log_q_samples,))
    assert check(losses.proposal_nll, (log_q,))


def test_proposal_kl_teaches_the_proposal_alone() -> None:
    f_samples, log_q_samples = _randn(6, 3).requires_grad_(), _randn(6, 3, seed=1).requires_grad_()
    losses.proposal_kl(f_samples, log_q_samples).sum().backward()
    assert f_samples.grad is None
    torch.testing.assert_close(log_q_samples.grad, -(f_samples - log_q_samples).detach().softmax(0))
