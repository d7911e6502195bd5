"""The list of experiments. A method is a line here; what it minimises is the library's objective of that name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import energyreg as er
from energyreg import objectives
from energyreg.densities.noise import GaussianNoise
from experiments.one_dimensional.networks import ConditionalMixture, EnergyNetwork, MixtureHead, Model, tanh_network
from experiments.one_dimensional.training import Library, Papers, Setting

__all__ = ["SETTINGS", "papers"]

STEPS = 75 * 63
"""Steps of a training of the papers."""


def noise(*scales: float) -> GaussianNoise:
    """The papers' noise: a component drawn for each sample."""
    return GaussianNoise(scales, stratified=False)


def papers(
    task: str, short: str, method: str, network: Callable[..., Model], objective: Callable[[int], Any],
    samples: int = 1024, *, seeds: int = 20, block: int | None = None, work: float = 1.0, **options: Any,
) -> Papers:  # fmt: skip
    """A setting of the papers.

    Args:
        task, method, network, objective, samples, seeds, options: See :class:`Papers`.
        short: The method in the name of the setting.
        block: Seeds trained at once; by default as many as fill the processor, 5 for M = 1024.
        work: Evaluations of the network and its gradient in a step, relative to NCE's.
    """
    if block is None:
        block = min(seeds, 5 if samples * work >= 512 else 20)
    name = f"{task}-{short}" if samples in (0, 1024) else f"{task}-{short}-m{samples}"
    seconds = STEPS * (0.003 + 3e-7 * 32 * block * samples * work)
    return Papers(name, task, method, samples, seeds, block, seconds, network, objective, **options)


def energy(generators: Any) -> Model:
    """The network of papers I and II."""
    return Model(tanh_network(generators))


def smooth_energy(generators: Any) -> Model:
    """The same for objectives with derivatives of f in y, which need second derivatives in training."""
    return Model(tanh_network(generators, fused=False))


def relu_energy(generators: Any) -> Model:
    """The network of paper IV."""
    return Model(EnergyNetwork(generators))


def with_proposal(generators: Any, num_components: int, normaliser: bool = False) -> Model:
    """The network of paper IV with a mixture on its detached features."""
    return Model(EnergyNetwork(generators, normaliser=normaliser), MixtureHead(generators, num_components))


def mixture(generators: Any, num_components: int) -> Model:
    """A mixture density network."""
    return Model(None, ConditionalMixture(generators, num_components))


def teacher_and_mixture(generators: Any, num_components: int) -> Model:
    """The same beside an energy-based model, each with its own network."""
    return Model(EnergyNetwork(generators), ConditionalMixture(generators, num_components))


# Papers I and II -----------------------------------------------------------------------------------------------------

IMPORTANCE_SAMPLED = {
    "ML-IS": ("mlis", lambda m: objectives.MaximumLikelihoodImportanceSampling(noise(0.2, 1.6), m)),
    "KLD-IS": ("kldis", lambda m: objectives.KLDImportanceSampling(noise(0.2, 1.6), 0.025, m, self_normalised=False)),
    "NCE": ("nce", lambda m: objectives.NCE(noise(0.1, 0.8), m)),
    "NCE+": ("nceplus", lambda m: objectives.NCE(noise(0.1, 0.8), m, beta=0.025)),
}
DSM_SCALE = {"toy1": 0.2, "toy2": 0.075}
MCMC_STEP = {"toy1": 0.05, "toy2": 0.0125}


def score_matching(m: int) -> Any:
    """Score matching needs no samples."""
    return objectives.ScoreMatching()


def denoising(m: int, scale: float) -> Any:
    """Denoising score matching with M samples."""
    return objectives.DenoisingScoreMatching(scale, m)


def langevin(m: int, step_size: float) -> Any:
    """Maximum likelihood by 16 Langevin steps of M chains."""
    return objectives.MaximumLikelihoodMCMC(16, step_size, m)


def mixture_likelihood(m: int) -> Any:
    """The likelihood of a mixture density network."""
    return objectives.ProposalNLL()


def _papers_1_2(task: str) -> list[Papers]:
    dsm, mcmc = partial(denoising, scale=DSM_SCALE[task]), partial(langevin, step_size=MCMC_STEP[task])
    methods = [(short, method, energy, objective) for method, (short, objective) in IMPORTANCE_SAMPLED.items()]
    return [
        *(papers(task, *method) for method in methods),
        papers(task, "sm", "SM", smooth_energy, score_matching, 0),
        papers(task, "dsm", "DSM", smooth_energy, dsm, seeds=2, work=3.5),
        papers(task, "dsm", "DSM", smooth_energy, dsm, 64, work=3.5),
        papers(task, "mlmcmc16", "ML-MCMC-16", energy, mcmc, seeds=2, work=14),
        papers(task, "mlmcmc16", "ML-MCMC-16", energy, mcmc, 64, block=20, work=14),
        papers(task, "mdn-k4", "MDN, K = 4", partial(mixture, num_components=4), mixture_likelihood, 0),
        *(papers(task, *method, m, seeds=5) for method in methods for m in (8, 32, 128)),
    ]


# Paper IV ------------------------------------------------------------------------------------------------------------

HAND_DESIGNED = {"toy1": (0.1, 0.8), "paper4": (0.4, 3.2)}


def hand_designed(m: int, scales: tuple[float, float]) -> Any:
    """NCE with noise around the target."""
    return objectives.NCE(noise(*scales), m)


def learned(m: int) -> Any:
    """NCE for f, J_KL for the proposal."""
    return objectives.NCEWithLearnedProposal(m)


def joint(m: int) -> Any:
    """The joint objective J: ML-IS for f, J_KL for the proposal."""
    return objectives.MaximumLikelihoodWithLearnedProposal(m)


def self_normalised(m: int) -> Any:
    """The self-normalised likelihood, a method of 2025."""
    return objectives.SelfNormalisedLikelihood(m)


def teacher(m: int) -> Any:
    """NCE for the teacher; J_KL and the likelihood, half each, for the mixture."""
    return objectives.NCEWithLearnedProposal(m, kl_weight=0.5, nll_weight=0.5)


def _paper_4(task: str) -> list[Papers]:
    by_hand = partial(hand_designed, scales=HAND_DESIGNED[task])
    k4, k4_with_b = (partial(with_proposal, num_components=4, normaliser=flag) for flag in (False, True))
    settings = [
        papers(task, "nce-hand", "NCE, noise by hand", relu_energy, by_hand),
        *(_learned(task, k) for k in (1, 4, 16)),
        papers(task, "joint-k4", "joint J, K = 4", k4, joint),
        papers(task, "snl-k4", "SNL, K = 4", k4_with_b, self_normalised),
    ]
    for k in (4, 8) if task == "paper4" else (4,):
        both = partial(teacher_and_mixture, num_components=k)
        settings.append(
            papers(task, f"teacher-k{k}", f"MDN with EBM teacher, K = {k}", both, teacher, judge_proposal=True)
        )
        if task == "paper4":
            alone = partial(mixture, num_components=k)
            settings.append(papers(task, f"mdn-k{k}", f"MDN, K = {k}", alone, mixture_likelihood, 0))
    return settings


def _learned(task: str, k: int, m: int = 1024, **options: Any) -> Papers:
    network = partial(with_proposal, num_components=k)
    return papers(task, f"nce-jkl-k{k}", f"NCE + J_KL, K = {k}", network, learned, m, work=1.3, **options)


# The library's defaults ----------------------------------------------------------------------------------------------


def default_model() -> er.EnergyRegressionModel:
    """The library's default for many rows: a separable head on the marginal of the targets."""
    return er.EnergyRegressionModel.for_table(num_features=1)


def default_mixture(num_components: int, num_rows: int) -> er.EnergyRegressionModel:
    """A mixture with the encoder that goes with the number of rows."""
    return er.EnergyRegressionModel.mixture_for_table(1, num_components=num_components, num_rows=num_rows)


def moving_edges() -> er.EnergyRegressionModel:
    """The default with a head for sharp borders that move with x."""
    model = default_model()
    return er.EnergyRegressionModel(
        model.encoder, er.heads.EdgeHead(model.encoder.context_dim, num_edges=64), space=er.spaces.Real(1)
    )


def on_mixture(width: int | None) -> er.EnergyRegressionModel:
    """Its default for few rows: a separable head on a mixture of eight, which the energy starts from."""
    return er.EnergyRegressionModel.for_table(num_features=1, num_rows=2000, width=width)


def _library(task: str) -> list[Library]:
    many = task == "slabs"
    mixtures = {f"K={k}": partial(default_mixture, k, 16_000 if many else 2000) for k in (4, 8, 16, 30)}
    # The large set takes fewer passes, and seeds.
    fit = {"epochs": 40} if many else {}
    large, seeds = (3, 3) if many else (1, 5)
    return [
        Library(
            f"{task}-library",
            task,
            "energyreg, marginal as base",
            0,
            seeds,
            seeds,
            60.0 * large,
            {"default": default_model},
            fit,
        ),
        Library(
            f"{task}-edges", task, "energyreg, EdgeHead", 0, seeds, seeds, 150.0 * large, {"edges": moving_edges}, fit
        ),
        Library(
            f"{task}-on-mixture",
            task,
            "energyreg, mixture as base",
            0,
            seeds,
            seeds,
            100.0 * large,
            {"on": partial(on_mixture, 256 if many else None)},
            fit,
        ),
        Library(
            f"{task}-library-mixture", task, "mixture, K by validation", 0, seeds, seeds, 150.0 * large, mixtures, fit
        ),
    ]


SETTINGS: list[Setting] = [
    *_papers_1_2("toy1"),
    *_papers_1_2("toy2"),
    *_paper_4("toy1"),
    *_paper_4("paper4"),
    *(_learned("toy1", 4, m, seeds=5) for m in (8, 32, 128)),
    *(setting for task in ("toy1", "toy2", "paper4", "slabs") for setting in _library(task)),
]
