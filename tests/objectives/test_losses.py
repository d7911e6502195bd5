"""Laws of the losses: numbers by hand, invariances, gradients, extreme scores."""

import math

import pytest
import torch
from torch import Tensor

from energyreg.objectives import losses


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
    log_label = torch.tensor([[-2.0], [-math.inf]])  # where f may be -inf, there is no label
    values = [
        losses.nce(f, f_noise, log_q, log_q_noise),
        losses.maximum_likelihood_importance_sampling(f, f_noise, log_q_noise),
        losses.maximum_likelihood_quadrature(f, f_noise),
        losses.proposal_kl(f_noise, log_q_noise),
        losses.kld_importance_sampling(f_noise, log_q_noise, log_label, False),
        losses.kld_importance_sampling(f_noise, log_q_noise, log_label, True),
        losses.self_normalised_likelihood(f, f_noise, log_q_noise),
    ]
    if math.isfinite(sum(noise)):  # elsewhere the samples are the model's own, where f is finite
        values.append(losses.maximum_likelihood_mcmc(f, f_noise))
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
    log_label = _randn(6, 3, seed=4).requires_grad_()
    for self_normalised in (False, True):
        assert check(
            lambda *a, s=self_normalised: losses.kld_importance_sampling(*a, s), (f_samples, log_q_samples, log_label)
        )
    assert check(losses.maximum_likelihood_mcmc, (f, f_samples))
    assert check(losses.self_normalised_likelihood, (f, f_samples, log_q_samples))
    # Shifted to both sides of where the exponential becomes a straight line.
    for shift in (8.0, 14.0):
        assert check(lambda *a, c=shift: losses.self_normalised_likelihood(a[0], a[1] + c, a[2]), (f, f_samples, log_q))
    score, trace = _randn(3, 2, seed=5).requires_grad_(), _randn(3, seed=6).requires_grad_()
    assert check(losses.score_matching, (score, trace))
    score, noisy, y = (_randn(*shape, seed=7).requires_grad_() for shape in ((4, 3, 2), (4, 3, 2), (3, 2)))
    for scale in (0.7, torch.tensor([0.7, 2.0], dtype=torch.float64)):
        assert check(lambda *a, s=scale: losses.denoising_score_matching(*a, s), (score, noisy, y))


def test_proposal_kl_teaches_the_proposal_alone() -> None:
    f_samples, log_q_samples = _randn(6, 3).requires_grad_(), _randn(6, 3, seed=1).requires_grad_()
    losses.proposal_kl(f_samples, log_q_samples).sum().backward()
    assert f_samples.grad is None
    torch.testing.assert_close(log_q_samples.grad, -(f_samples - log_q_samples).detach().softmax(0))


def test_kld_importance_sampling_by_hand() -> None:
    # exp(f) / q is 2, 6, 1 with mean 3; p / q is 1/2, 1, 3/2 with mean 1.
    f, log_q = (
        torch.tensor([1.0, 3.0, 4.0]).double().log()[:, None],
        torch.tensor([0.5, 0.5, 4.0]).double().log()[:, None],
    )
    log_label = torch.tensor([0.25, 0.5, 6.0]).double().log()[:, None]
    expected = math.log(3) - (0.5 * math.log(1) + 1.0 * math.log(3) + 1.5 * math.log(4)) / 3
    for self_normalised in (False, True):
        loss = losses.kld_importance_sampling(f, log_q, log_label, self_normalised)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    # Weights that do not have mean one tell the two apart: twice the label density, twice the plain second term.
    doubled = losses.kld_importance_sampling(f, log_q, log_label + math.log(2))
    assert doubled.item() == pytest.approx(2 * expected - math.log(3), rel=1e-6)
    same = losses.kld_importance_sampling(f, log_q, log_label + math.log(2), True)
    assert same.item() == pytest.approx(expected, rel=1e-6)


def test_kld_importance_sampling_changes_with_a_constant_only_where_it_is_not_self_normalised() -> None:
    f, log_q, log_label = _randn(9, 5), _randn(9, 5, seed=1), _randn(9, 5, seed=2)
    weight = (log_label - log_q).exp().mean(0)
    for shift in (3.0, -200.0):
        normalised = losses.kld_importance_sampling(f + shift, log_q, log_label, True)
        expected = losses.kld_importance_sampling(f, log_q, log_label, True)
        torch.testing.assert_close(normalised, expected, rtol=0, atol=1e-10)
        plain = losses.kld_importance_sampling(f + shift, log_q, log_label, False)
        expected = losses.kld_importance_sampling(f, log_q, log_label, False) + shift * (1 - weight)
        torch.testing.assert_close(plain, expected, rtol=0, atol=1e-10)


def test_a_label_on_one_sample_makes_kld_maximum_likelihood_there() -> None:
    f, log_q = _randn(9, 5), _randn(9, 5, seed=1)
    log_label = torch.full_like(f, -math.inf)
    log_label[4] = 0.0
    loss = losses.kld_importance_sampling(f, log_q, log_label, True)
    torch.testing.assert_close(loss, losses.maximum_likelihood_importance_sampling(f[4], f, log_q))


def test_mcmc_and_score_losses_by_hand() -> None:
    loss = losses.maximum_likelihood_mcmc(torch.tensor([1.0]), torch.tensor([[0.5], [2.5]]))
    assert loss.item() == 0.5
    loss = losses.score_matching(torch.tensor([[3.0, -4.0]]), torch.tensor([-2.0]))
    assert loss.item() == 10.5
    # y = (1, 2), noise (2, -1) and (0, 1); with scale 2 the terms are score + noise / 4.
    score = torch.tensor([[[1.0, 0.0]], [[0.5, -1.0]]])
    noisy, y = torch.tensor([[[3.0, 1.0]], [[1.0, 3.0]]]), torch.tensor([[1.0, 2.0]])
    loss = losses.denoising_score_matching(score, noisy, y, 2.0)
    assert loss.item() == ((1.5**2 + 0.25**2) + (0.5**2 + 0.75**2)) / 2
    # With scales (1, 2) they are (score + noise / (1, 4)).
    loss = losses.denoising_score_matching(score, noisy, y, torch.tensor([1.0, 2.0]))
    assert loss.item() == ((3**2 + 0.25**2) + (0.5**2 + 0.75**2)) / 2


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_gradients_of_f_stay_finite_in_single_precision(size: float) -> None:
    score, trace = torch.full((2, 3), size, requires_grad=True), torch.full((2,), size, requires_grad=True)
    noisy_score = torch.full((4, 2, 3), size, requires_grad=True)
    for value, inputs in (
        (losses.score_matching(score, trace), (score, trace)),
        (losses.denoising_score_matching(noisy_score, torch.randn(4, 2, 3), torch.randn(2, 3), 1e-3), (noisy_score,)),
    ):
        assert value.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value.sum(), inputs))


def test_self_normalised_likelihood_by_hand() -> None:
    # exp(f) / q is 2, 6, 1 with mean 3.
    f_samples, log_q = torch.tensor([1.0, 3.0, 4.0]).log()[:, None], torch.tensor([0.5, 0.5, 4.0]).log()[:, None]
    loss = losses.self_normalised_likelihood(torch.tensor([0.5]), f_samples, log_q)
    assert loss.item() == pytest.approx(3 - 1 - 0.5, rel=1e-6)


def test_self_normalised_likelihood_bounds_the_likelihood_and_is_tight_at_one() -> None:
    # log Z from -50 to 1,000, over the place where the bound becomes a straight line.
    log_z = torch.cat([torch.linspace(-50, 12, 500), torch.linspace(12, 1000, 200)]).double()
    zero = torch.zeros_like(log_z)
    bound = losses.self_normalised_likelihood(zero, log_z[None], zero[None])
    assert (bound >= log_z).all()
    assert losses.self_normalised_likelihood(zero[:1], zero[None, :1], zero[None, :1]).item() == 0
    # For the same samples it is never below ML-IS, whatever the constant of f.
    f, f_samples, log_q = _randn(500), _randn(7, 500, seed=1), _randn(7, 500, seed=2)
    for shift in (-5.0, 0.0, 5.0, 12.0, 30.0):
        upper = losses.self_normalised_likelihood(f + shift, f_samples + shift, log_q)
        lower = losses.maximum_likelihood_importance_sampling(f + shift, f_samples + shift, log_q)
        assert (upper >= lower - 1e-9 * upper.abs()).all()
    # Shifted by its own log Z the two are one.
    log_z = (f_samples - log_q).logsumexp(0) - math.log(7)
    tight = losses.self_normalised_likelihood(f - log_z, f_samples - log_z, log_q)
    torch.testing.assert_close(tight, losses.maximum_likelihood_importance_sampling(f, f_samples, log_q))


def test_self_normalised_likelihood_goes_on_as_a_straight_line_with_the_same_slope() -> None:
    start, step = losses.LINEAR_FROM, 1e-6
    log_z = torch.tensor([start - step, start, start + step, start + 1, start + 1000], dtype=torch.float64)
    log_z.requires_grad_()
    zero = torch.zeros(5, dtype=torch.float64)
    value = losses.self_normalised_likelihood(zero, log_z[None], zero[None]) + 1
    (slope,) = torch.autograd.grad(value.sum(), log_z)
    e = math.exp(start)
    torch.testing.assert_close(value.detach(), e * torch.tensor([1 - step, 1.0, 1 + step, 2.0, 1001.0]).double())
    torch.testing.assert_close(slope, e * torch.tensor([1 - step, 1.0, 1.0, 1.0, 1.0]).double())


def test_where_every_sample_is_impossible_the_estimate_of_z_is_zero() -> None:
    f = torch.zeros(1, requires_grad=True)
    loss = losses.self_normalised_likelihood(f, torch.full((3, 1), -math.inf), torch.zeros(3, 1))
    (gradient,) = torch.autograd.grad(loss.sum(), f)
    assert loss.item() == gradient.item() == -1
