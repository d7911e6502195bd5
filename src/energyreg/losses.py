r"""Losses as pure functions on tensors; nothing here knows a model.

All are in log space and per example. Shapes: ``B`` examples, ``M`` samples or nodes.
"""

from __future__ import annotations

import math

from torch import Tensor

__all__ = [
    "maximum_likelihood_importance_sampling",
    "maximum_likelihood_quadrature",
    "nce",
    "proposal_kl",
    "proposal_nll",
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
