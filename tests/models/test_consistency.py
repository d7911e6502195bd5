"""Where the objectives have their minimum, on a problem where every expectation over the truth is a sum.

The energy is the truth plus a table: f(x, y) = log p(y|x) + c(x) + Σ_k θ_k(x) h_k(y), with hats h_k on a grid of y. The
mean over the data is a quadrature over the true conditional, so that only the objective's own samples are random. An
objective is consistent if its expected gradient in θ is zero at θ = 0, in all directions.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution

from energyreg.densities.bases import Lebesgue
from energyreg.densities.mixtures import GaussianMixture
from energyreg.densities.noise import GaussianNoise
from energyreg.inference.energy import EnergyFunction
from energyreg.objectives import (
    NCE,
    DenoisingScoreMatching,
    ExactMaximumLikelihood,
    KLDImportanceSampling,
    MaximumLikelihoodImportanceSampling,
    MaximumLikelihoodMCMC,
    NCEWithLearnedProposal,
    ScoreMatching,
    SelfNormalisedLikelihood,
)

DOUBLE = torch.float64
END, CELLS, SPACING = 5.0, 200, 0.5
KNOTS = torch.arange(-END, END + SPACING / 2, SPACING, dtype=DOUBLE)
STEP = 2 * END / CELLS
GRID = -END + (torch.arange(CELLS, dtype=DOUBLE) + 0.5) * STEP  # a kink of a hat is always between two cells
ROUGHLY = 5e-5
"""The rule of midpoints on GRID: the step squared over 24, times a slope of about one half."""

# Two x: two narrow modes of unequal weight, and a skew one.
LOGITS = torch.tensor([[0.0, 1.0], [0.0, 0.5]], dtype=DOUBLE)
MEANS = torch.tensor([[[-1.0], [1.2]], [[-0.3], [0.6]]], dtype=DOUBLE)
SCALES = torch.tensor([[[0.5], [0.6]], [[0.5], [1.0]]], dtype=DOUBLE)
Y = GRID.repeat(2)[:, None]
"""Every y with every x, (B, 1); the first half of the rows is the first x."""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rows(blur: float = 0.0) -> GaussianMixture:
    """The truth in each row, convolved with a Gaussian of standard deviation blur."""
    scales = (SCALES.square() + blur**2).sqrt()
    return GaussianMixture(*(t.repeat_interleave(CELLS, 0) for t in (LOGITS, MEANS, scales)))


WEIGHTS = _rows().log_prob(Y).exp() * STEP


def _hats(y: Tensor, theta: Tensor) -> Tensor:
    """Σ θ_k h_k(y) by linear interpolation, zero far out; y (*S, B, 1) to (*S, B)."""
    padded = torch.nn.functional.pad(theta, (2, 2))
    position = ((y[..., 0] + END) / SPACING + 2).clamp(0, len(padded) - 1.001)
    index = position.long()
    return torch.lerp(padded[index], padded[index + 1], position - index)


def _bumps(y: Tensor, theta: Tensor) -> Tensor:
    """The same with smooth functions, for objectives that take derivatives in y."""
    return (-0.5 * ((y - KNOTS) / SPACING).square()).exp() @ theta


def _gradient(
    objective: Any,
    seed: int = 0,
    *,
    q: Distribution | None = None,
    blur: float = 0.0,
    table: Tensor | None = None,
    shift: float = 0.0,
    features: Callable[[Tensor, Tensor], Tensor] = _hats,
) -> Tensor:
    """Gradient of the expected loss in the table, shape (2, K), for one draw of the objective's samples."""
    theta = torch.zeros(2, len(KNOTS), dtype=DOUBLE) if table is None else table.clone()
    theta.requires_grad_()
    density = _rows(blur)

    def f(y: Tensor) -> Tensor:
        values = torch.stack([features(half, row) for half, row in zip(y.split(CELLS, -2), theta, strict=True)], -2)
        return density.log_prob(y) + shift + values.flatten(-2)

    loss = objective(f, q, Y, generator=_generator(seed)).per_example
    return torch.autograd.grad((loss * WEIGHTS).sum(), theta)[0]


def _gradients(objective: Any, repeats: int, **settings: Any) -> Tensor:
    return torch.stack([_gradient(objective, seed, **settings) for seed in range(repeats)])


def _is_zero(gradients: Tensor, also: float = 0.0) -> bool:
    """Whether the mean is zero within five standard errors: 42 numbers, standard errors from some 30 repeats."""
    stderr = gradients.std(0) / math.sqrt(len(gradients))
    return bool((gradients.mean(0).abs() < 5 * stderr + ROUGHLY + also).all())


def _expectation(blur: float = 0.0) -> Tensor:
    """Mean of each hat over the blurred truth, for both x, shape (2, K)."""
    hats = (1 - (GRID[:, None] - KNOTS).abs() / SPACING).clamp_min(0)
    return (_rows(blur).log_prob(Y).exp() * STEP).unflatten(0, (2, CELLS)) @ hats


class _Broad(Distribution):
    """A proposal that is the same for all y, and no mixture of ours: its samples are independent."""

    def __init__(self) -> None:
        super().__init__(torch.Size([2 * CELLS]), torch.Size([1]), validate_args=False)
        self.mixture = torch.distributions.StudentT(5.0, torch.zeros(1, dtype=DOUBLE), 1.2)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.mixture.sample((*sample_shape, 2 * CELLS))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.mixture.log_prob(value)[..., 0]


WRONG = 0.5 * (0.7 * torch.arange(2 * len(KNOTS), dtype=DOUBLE)).sin().reshape(2, -1)
"""A table that is not zero: where a consistent objective must have a gradient."""


# With a proposal that does not know the target ----------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 8])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_nce_has_its_minimum_at_the_truth_for_any_number_of_samples(num_samples: int, shift: float) -> None:
    objective = NCEWithLearnedProposal(num_samples, kl_weight=0.0, nll_weight=1.0)
    gradients = _gradients(objective, 30, q=_Broad(), shift=shift)
    assert _is_zero(gradients)
    assert gradients.std(0).max() < 0.03  # so that 0.03 / √30 would show
    assert not _is_zero(_gradients(objective, 30, q=_Broad(), shift=shift, table=WRONG))


@pytest.mark.parametrize("num_samples", [1, 8])
def test_self_normalised_likelihood_has_its_minimum_at_the_truth_for_any_number_of_samples(num_samples: int) -> None:
    objective = SelfNormalisedLikelihood(num_samples)
    assert _is_zero(_gradients(objective, 30, q=_Broad()))
    assert not _is_zero(_gradients(objective, 30, q=_Broad(), table=WRONG))
    # At another log-normaliser than log Z it pulls all of f there.
    pull = _gradients(objective, 30, q=_Broad(), shift=0.5)
    assert _is_zero(pull - math.expm1(0.5) * _expectation())
    assert not _is_zero(pull)


@pytest.mark.parametrize("num_samples", [1, 8])
def test_self_normalised_likelihood_is_the_likelihood_on_average(num_samples: int) -> None:
    # For one sample too, where log Z by importance sampling would be far too low.
    density, objective = _rows(), SelfNormalisedLikelihood(num_samples, kl_weight=1.0, nll_weight=0.0)
    means = torch.stack([
        (objective(density.log_prob, _Broad(), Y, generator=_generator(seed)).per_example * WEIGHTS).sum()
        for seed in range(40)
    ])  # fmt: skip
    entropy = -(WEIGHTS * WEIGHTS.div(STEP).log()).sum()
    assert abs(means.mean() - entropy) < 4 * means.std() / math.sqrt(40) + ROUGHLY
    assert means.std() / math.sqrt(40) < 0.02


# The exact likelihood -----------------------------------------------------------------------------------------------


def test_exact_likelihood_has_its_minimum_at_the_truth() -> None:
    window = Lebesgue(margin=0.0).double()
    window.fit(torch.tensor([[-END], [END]], dtype=DOUBLE))

    def gradient(theta: Tensor, seed: int) -> Tensor:
        theta = theta.clone().requires_grad_()

        def head(context: Tensor, v: Tensor) -> Tensor:  # context is which x
            y = END * v.expand(*v.shape[:-2], len(context), 1)
            truth = GaussianMixture(LOGITS[context], MEANS[context], SCALES[context])
            return truth.log_prob(y) + torch.cat(
                [_hats(half, row) for half, row in zip(y.split(CELLS, -2), theta, strict=True)], -1
            )

        f = EnergyFunction(head, torch.arange(2).repeat_interleave(CELLS), window)
        loss = ExactMaximumLikelihood(1024)(f, None, Y, generator=_generator(seed)).per_example
        return torch.autograd.grad((loss * WEIGHTS).sum(), theta)[0]

    # The jittered nodes leave an error of (cell width)^(3/2): 3e-5 for 1,024 of them, and no bias.
    assert _is_zero(torch.stack([gradient(torch.zeros_like(WRONG), seed) for seed in range(5)]), also=3e-5)
    assert gradient(WRONG, 0).abs().max() > 0.02


# Noise around the target --------------------------------------------------------------------------------------------

INDEPENDENT = GaussianNoise([0.4, 1.6], stratified=False)


def _shrinks_like_one_over_m(make: Callable[[int], Any]) -> None:
    """Four times the samples, a quarter of the gradient that is left at the truth."""
    few, many = _gradients(make(32), 160), _gradients(make(128), 100)
    assert not _is_zero(few)
    # Along the direction of the bias, which is estimated from draws of their own.
    direction = few[:60].mean(0)
    along_few, along_many = ((g * direction).sum((1, 2)) / direction.norm() for g in (few[60:], many))
    share = along_many.mean() / along_few.mean()
    noise = torch.stack([along_many.std(), share * along_few.std()]).norm() / math.sqrt(100) / along_few.mean()
    assert noise < 0.06
    # The next order, 1 / M², is within a tenth or so of the first at M = 32.
    assert abs(share - 0.25) < 4 * noise + 0.03


def test_bias_of_importance_sampling_around_the_target_shrinks_like_one_over_m() -> None:
    _shrinks_like_one_over_m(lambda m: MaximumLikelihoodImportanceSampling(INDEPENDENT, m))


def test_bias_of_nce_around_the_target_shrinks_like_one_over_m() -> None:
    # Noise that is centred at the target tells which point the target is, so that ranking is consistent only in the
    # limit of many samples; with a proposal that does not know the target it is for any number.
    _shrinks_like_one_over_m(lambda m: NCE(INDEPENDENT, m))


def test_gradient_of_nce_around_the_target_with_one_sample() -> None:
    # By quadrature over target and sample; it is not zero at the truth.
    expected = []
    for half in range(2):
        log_p = _rows().log_prob(Y)[half * CELLS : (half + 1) * CELLS]
        log_q = INDEPENDENT.log_prob(GRID[None, :, None].expand(CELLS, -1, 1).movedim(0, 1), GRID[:, None])  # [y₁, y₀]
        at_target = INDEPENDENT.log_prob(GRID[:, None], GRID[:, None])
        share = torch.sigmoid(log_p[:, None] - log_q - log_p + at_target)
        joint = (log_p + log_q).exp() * share * STEP**2
        hats = (1 - (GRID[:, None] - KNOTS).abs() / SPACING).clamp_min(0)
        expected.append(hats.T @ joint.sum(1) - hats.T @ joint.sum(0))
    gradients = _gradients(NCE(INDEPENDENT, 1), 40)
    expected = torch.stack(expected)
    # Samples beyond the grid, which the quadrature leaves out, have a truth of less than 1e-5.
    assert _is_zero(gradients - expected, also=ROUGHLY)
    assert expected.abs().max() > 0.005


@pytest.mark.parametrize("beta", [0.1, 0.2])
def test_nce_plus_is_drawn_to_the_blurred_truth(beta: float) -> None:
    # With many samples the positive's noise moves the minimum to the truth blurred by it, so that NCE+ is biased by β²
    # times a curvature. The difference to NCE with the same samples, so that what M leaves cancels up to β² / M.
    num_samples = 256
    plain = _gradients(NCE(INDEPENDENT, num_samples), 12)
    plus = _gradients(NCE(INDEPENDENT, num_samples, beta=beta), 12)
    blurred = sum(_expectation(beta * scale) for (scale,) in INDEPENDENT.scales) / 2
    expected = _expectation() - blurred
    assert _is_zero(plus - plain - expected, also=0.1 * float(expected.abs().max()))
    if beta == 0.2:
        once = _expectation() - sum(_expectation(0.1 * s) for (s,) in INDEPENDENT.scales) / 2
        # Four times the bias for twice the β, to the next order.
        assert 3 < expected.norm() / once.norm() < 4.5


def test_nce_plus_becomes_nce_as_beta_goes_to_zero() -> None:
    density, y = _rows(), Y
    loss = {
        beta: NCE(INDEPENDENT, 16, beta=beta)(density.log_prob, None, y, generator=_generator(0)).per_example
        for beta in (0.0, 1e-6, 1e-4, 1e-2)
    }
    differences = [(loss[beta] - loss[0.0]).abs().max() for beta in (1e-6, 1e-4, 1e-2)]
    # The slopes of log p are 15 at most here, and the positive moves by at most 1.6 β times some three: 72 β.
    for beta, difference in zip((1e-6, 1e-4, 1e-2), differences, strict=True):
        assert 0 < difference < 100 * beta
    plain = NCE(INDEPENDENT, 16)(density.log_prob, None, y, generator=_generator(0)).per_example
    assert torch.equal(plain, loss[0.0])


def test_importance_sampling_around_the_target_becomes_the_likelihood_with_a_bias_of_one_over_m() -> None:
    # The bias of log Z is half the relative variance of exp(f) / q over M, which quadrature gives; next order 1/M².
    density, noise = _rows(), GaussianNoise([0.5, 2.0], stratified=False)
    points = GRID[:, None, None].expand(-1, 2 * CELLS, 1)
    ratio = 2 * density.log_prob(points) - noise.log_prob(points, Y)
    variance = (WEIGHTS * (ratio.exp().sum(0) * STEP - 1)).sum() / 2
    exact = -density.log_prob(Y)
    sizes, biases = [8, 32, 128], []
    for num_samples, repeats in zip(sizes, (80, 80, 80), strict=True):
        objective = MaximumLikelihoodImportanceSampling(noise, num_samples)
        draws = torch.stack([
            ((objective(density.log_prob, None, Y, generator=_generator(seed)).per_example - exact) * WEIGHTS).sum()
            for seed in range(repeats)
        ]) / 2  # fmt: skip
        stderr = draws.std() / math.sqrt(repeats)
        biases.append(float(draws.mean()))
        relative = float(variance) / num_samples  # the next order is about its square
        assert abs(draws.mean() + variance / (2 * num_samples)) < 4 * stderr + 2 * relative**2
        assert stderr < 0.2 * variance / (2 * num_samples)
    slope = math.log(biases[2] / biases[1]) / math.log(4)
    assert all(bias < 0 for bias in biases)
    # The last bias is known to 20 %, and the slope to 0.2 / log 4; three of these.
    assert abs(slope + 1) < 0.45


@pytest.mark.parametrize("self_normalised", [False, True])
def test_kl_to_a_label_density_has_its_minimum_at_the_blurred_truth(self_normalised: bool) -> None:
    blur, noise = 0.4, GaussianNoise([0.6, 1.6], stratified=True)
    objective = KLDImportanceSampling(noise, blur, 512, self_normalised)
    # The bias of 1 / M is at most a relative variance of a few, over M.
    at_blurred = _gradients(objective, 12, blur=blur)
    assert _is_zero(at_blurred, also=1e-3)
    # At the truth itself the gradient is what the label density moves.
    moved = _expectation() - _expectation(blur)
    at_truth = _gradients(objective, 12)
    assert _is_zero(at_truth - moved, also=2e-3)
    assert moved.abs().max() > 0.03


# Gradients of f in y ------------------------------------------------------------------------------------------------


def test_score_matching_has_its_minimum_at_the_truth() -> None:
    # No randomness at all; integration by parts leaves the density at the end of GRID, 2e-5, times a slope.
    gradient = _gradient(ScoreMatching(), features=_bumps, shift=2.0)
    assert gradient.abs().max() < 4e-5
    assert _gradient(ScoreMatching(), features=_bumps, table=WRONG).abs().max() > 0.1
    # With one dimension a probe of signs is exact.
    torch.testing.assert_close(_gradient(ScoreMatching(1), features=_bumps, shift=2.0), gradient)


def test_score_matching_of_a_gaussian_gives_mean_and_variance() -> None:
    y = 3 + 2 * torch.randn(50, 1, generator=_generator(0), dtype=DOUBLE)
    mean, variance = y.mean().requires_grad_(), y.var(correction=0).requires_grad_()

    def f(y: Tensor) -> Tensor:
        return -(y[..., 0] - mean).square() / (2 * variance)

    loss = ScoreMatching()(f, None, y).per_example
    by_hand = -1 / variance + (y[:, 0] - mean).square() / (2 * variance**2)
    torch.testing.assert_close(loss, by_hand)
    slopes = torch.autograd.grad(loss.mean(), (mean, variance), create_graph=True)
    assert all(abs(slope) < 1e-12 for slope in slopes)
    curvatures = [
        torch.autograd.grad(s, p, retain_graph=True)[0] for s, p in zip(slopes, (mean, variance), strict=True)
    ]
    assert all(curvature > 0 for curvature in curvatures)


@pytest.mark.parametrize("num_samples", [1, 16])
def test_denoising_score_matching_has_its_minimum_at_the_blurred_truth(num_samples: int) -> None:
    blur = 0.5
    objective = DenoisingScoreMatching(blur, num_samples)
    at_blurred = _gradients(objective, 30, blur=blur, features=_bumps)
    assert _is_zero(at_blurred)
    at_truth = _gradients(objective, 30, features=_bumps)
    assert not _is_zero(at_truth)
    assert at_truth.mean(0).abs().max() > 0.2


def test_mcmc_from_the_target_has_its_minimum_at_the_truth_for_small_steps() -> None:
    # Chains that start in their own density stay there, but for a step's own error of λ² times the time L λ² / 2. Mean
    # over the hats: about 0.01 at λ² = 0.01, time 0.05 and curvatures of 1 / 0.5² squared.
    objective = MaximumLikelihoodMCMC(10, 0.1, 8)
    gradients = _gradients(objective, 20)
    assert _is_zero(gradients, also=2e-3)
    wrong = _gradients(objective, 20, table=3 * WRONG)
    assert not _is_zero(wrong, also=2e-3)
    # One long step in place of many small ones is biased, and says by how much the others are not.
    long = _gradients(MaximumLikelihoodMCMC(1, 0.7, 8), 20)
    assert not _is_zero(long, also=2e-3)
