r"""Losses as pure functions on tensors; nothing here knows a model.

All are in log space and per example. Shapes: ``B`` examples, ``M`` samples or nodes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "denoising_score_matching",
    "kld_importance_sampling",
    "maximum_likelihood_importance_sampling",
    "maximum_likelihood_mcmc",
    "maximum_likelihood_quadrature",
    "nce",
    "proposal_kl",
    "proposal_nll",
    "score_matching",
    "self_normalised_likelihood",
]


def maximum_likelihood_quadrature(f_target: Tensor, log_weights: Tensor) -> Tensor:
    r"""Negative log-likelihood with the partition function by quadrature.

    .. math:: \log \sum_m w_m \exp f(x, y_m) - f(x, y)

    Args:
        f_target: f(x, y) at the observed targets, shape (B,).
        log_weights: log of f's exponential at the nodes times the quadrature weight, shape (M, B).

    Returns:
        The loss of each example, in nats, shape (B,).
    """
    return log_weights.logsumexp(0) - f_target


def maximum_likelihood_importance_sampling(f_target: Tensor, f_samples: Tensor, log_q_samples: Tensor) -> Tensor:
    r"""Negative log-likelihood with the partition function by importance sampling (ML-IS).

    .. math:: \log \frac{1}{M} \sum_m \frac{\exp f(x, y_m)}{q(y_m)} - f(x, y)

    Biased low by about the relative variance of the estimate over two, which falls as 1/M.

    Args:
        f_target: f(x, y) at the observed targets, shape (B,).
        f_samples: f(x, y_m) at the samples of q, shape (M, B).
        log_q_samples: log q(y_m), in nats, shape (M, B).

    Returns:
        The loss of each example, in nats, shape (B,).

    Source:
        Gustafsson et al., "Energy-based models for deep probabilistic regression", ECCV 2020 (training by ML-IS).
    """
    return maximum_likelihood_quadrature(f_target, f_samples - log_q_samples - math.log(len(f_samples)))


def nce(f_target: Tensor, f_noise: Tensor, log_q_target: Tensor, log_q_noise: Tensor) -> Tensor:
    r"""Ranking noise contrastive estimation: which of M + 1 points is the observed target?

    .. math:: -\log \frac{\exp(f_0 - \log q_0)}{\sum_{m=0}^{M} \exp(f_m - \log q_m)}

    Args:
        f_target: f(x, y) at the observed targets, shape (B,).
        f_noise: f(x, y_m) at the noise samples, shape (M, B).
        log_q_target: log q at the observed targets, in nats, shape (B,).
        log_q_noise: log q at the noise samples, in nats, shape (M, B).

    Returns:
        The loss of each example, in nats, shape (B,). Never negative; log(M + 1) for a model that cannot tell.

    Source:
        Gustafsson et al., "How to train your energy-based model for regression", BMVC 2020; Ma and Collins, EMNLP 2018.
    """
    positive = f_target - log_q_target
    noise = f_noise - log_q_noise
    return noise.logsumexp(0).logaddexp(positive) - positive


def kld_importance_sampling(
    f_samples: Tensor, log_q_samples: Tensor, log_label_samples: Tensor, self_normalised: bool = False
) -> Tensor:
    r"""KL divergence from a label density p(y|y_i) to the model, by importance sampling (KLD-IS).

    .. math:: \log \frac1M \sum_m \frac{\exp f_m}{q_m} - \frac1M \sum_m f_m \frac{p_m}{q_m}

    up to the entropy of the label density, which no parameter changes. Its minimiser is the true conditional density
    convolved with the label density.

    Args:
        f_samples: f(x, y_m) at the samples of q, shape (M, B).
        log_q_samples: log q(y_m), in nats, shape (M, B).
        log_label_samples: log p(y_m | y_i) of the label density, in nats, shape (M, B).
        self_normalised: Whether the weights p/q of the second term are normalised to a sum of one, so that a constant
            added to f changes nothing, as in the exact loss. The paper's code does not.

    Returns:
        The loss of each example, in nats, shape (B,).

    Source:
        Gustafsson et al., BMVC 2020 (KLD-IS).
    """
    log_ratio = log_label_samples - log_q_samples
    log_m = math.log(len(f_samples))
    log_weights = log_ratio.log_softmax(0) if self_normalised else log_ratio - log_m
    weights = log_weights.exp()
    # Where the label density is zero, f may be -inf: such a point adds nothing.
    second = (weights * torch.where(weights == 0, torch.zeros_like(f_samples), f_samples)).sum(0)
    return (f_samples - log_q_samples).logsumexp(0) - log_m - second


def maximum_likelihood_mcmc(f_target: Tensor, f_samples: Tensor) -> Tensor:
    r"""Contrast of the target with samples of the model (ML-MCMC), whose gradient estimates the likelihood's.

    .. math:: \frac1M \sum_m f(x, y_m) - f(x, y), \qquad y_m \sim p(y | x; \theta)

    with the samples held fixed. The value is no likelihood; for chains that start at the target it grows from zero.

    Args:
        f_target: f(x, y) at the observed targets, shape (B,).
        f_samples: f(x, y_m) at the fixed samples, shape (M, B).

    Returns:
        The loss of each example, shape (B,).

    Source:
        Gustafsson et al., BMVC 2020 (ML-MCMC); Hinton, Neural Computation 2002 (contrastive divergence).
    """
    return f_samples.mean(0) - f_target


def score_matching(score: Tensor, trace: Tensor) -> Tensor:
    r"""Score matching.

    .. math:: \mathrm{tr} \nabla_y^2 f(x, y) + \tfrac12 \| \nabla_y f(x, y) \|^2

    Needs an f that is twice differentiable in y and a density that vanishes at the border of its support.

    Args:
        score: Gradient of f in y at the observed targets, shape (B, D).
        trace: Trace of the Hessian there, or an estimate of it, shape (B,).

    Returns:
        The loss of each example, shape (B,).

    Source:
        Hyvärinen, JMLR 2005; Gustafsson et al., BMVC 2020 (SM).
    """
    return trace + 0.5 * score.square().sum(-1)


def denoising_score_matching(score: Tensor, noisy: Tensor, y: Tensor, scale: Tensor | float) -> Tensor:
    r"""Denoising score matching: f learns the score of the targets' density blurred by Gaussian noise.

    .. math:: \frac1M \sum_m \left\| \nabla_y f(x, \tilde y_m) + \frac{\tilde y_m - y}{\sigma^2} \right\|^2,
        \qquad \tilde y_m \sim N(y, \sigma^2 I)

    Args:
        score: Gradient of f in y at the noisy targets, shape (M, B, D).
        noisy: The noisy targets, shape (M, B, D).
        y: Observed targets, shape (B, D).
        scale: Standard deviation σ of the noise, a number or one per dimension (D,).

    Returns:
        The loss of each example, shape (B,). Without the factor 1/2, as in the paper's code.

    Source:
        Vincent, Neural Computation 2011; Gustafsson et al., BMVC 2020 (DSM).
    """
    return (score + (noisy - y) / torch.as_tensor(scale).to(noisy) ** 2).square().sum(-1).mean(0)


LINEAR_FROM = 10.0
"""Value of log Z beyond which the self-normalised likelihood continues as a straight line."""


def self_normalised_likelihood(f_target: Tensor, f_samples: Tensor, log_q_samples: Tensor) -> Tensor:
    r"""Self-normalised likelihood (SNL): an upper bound of the negative log-likelihood that needs no logarithm of Z.

    .. math:: \hat Z - 1 - f(x, y), \qquad \hat Z = \frac1M \sum_m \frac{\exp f(x, y_m)}{q(y_m)}

    with f = f' - b(x), b the learned log-normaliser. As Z - 1 ≥ log Z with equality at Z = 1, the bound is tight where
    b(x) is the true log-normaliser; the estimate is unbiased for any M. Beyond log Z = 10 the exponential goes on as a
    straight line, still a bound, so that nothing overflows.

    Args:
        f_target: f(x, y) at the observed targets, with the learned log-normaliser subtracted, shape (B,).
        f_samples: The same at the samples of q, shape (M, B).
        log_q_samples: log q(y_m), in nats, shape (M, B).

    Returns:
        The loss of each example, in nats, shape (B,).

    Source:
        Senetaire, Jeha, Mattei and Frellsen, "Learning energy-based models by self-normalising the likelihood",
        arXiv 2503.07021.
    """
    log_z = (f_samples - log_q_samples).logsumexp(0) - math.log(len(f_samples))
    # Not log_z - min(log_z, 10), which is NaN where f is -inf at all samples.
    # Nor a clamp, whose gradient at its bound depends on the version of torch.
    below = torch.where(log_z <= LINEAR_FROM, log_z, LINEAR_FROM)
    z = below.exp() + math.exp(LINEAR_FROM) * (log_z - LINEAR_FROM).relu()
    return z - 1 - f_target


def proposal_kl(f_samples: Tensor, log_q_samples: Tensor) -> Tensor:
    r"""J_KL, whose gradient in the parameters φ of q is that of KL(p(y|x) || q(y|x; φ)).

    .. math:: J(\phi) = \log \frac{1}{M} \sum_m \frac{\exp f(x, y_m)}{q(y_m | x; \phi)}, \qquad y_m \sim q

    with the samples held fixed. Its gradient is minus the self-normalised mean of grad log q(y_m), so minimising it
    draws q over all the mass of p (it does not seek one mode). Only q learns: f is detached here.

    Args:
        f_samples: f(x, y_m), shape (M, B). Detached inside.
        log_q_samples: log q(y_m | x; φ) at fixed samples, in nats, shape (M, B).

    Returns:
        The loss of each example, in nats, shape (B,). Its value estimates log Z(x), not the KL.

    Source:
        Gustafsson et al., "Learning proposals for practical energy-based regression", AISTATS 2022.
    """
    return (f_samples.detach() - log_q_samples).logsumexp(0) - math.log(len(f_samples))


def proposal_nll(log_q_target: Tensor) -> Tensor:
    r"""Negative log-likelihood of the proposal itself, -log q(y|x).

    Args:
        log_q_target: log q at the observed targets, in nats, shape (B,).

    Returns:
        The loss of each example, in nats, shape (B,).
    """
    return -log_q_target
