"""Training objectives: (f, q, y) to a loss per example. They say what to sample, how many, and which loss.

All have the contract of :mod:`energyreg.objectives.contract`.
"""

from energyreg.objectives.contract import EnergyObjective, Loss, NonFiniteLossError
from energyreg.objectives.learned_proposal import (
    LearnedProposalObjective,
    MaximumLikelihoodWithLearnedProposal,
    NCEWithLearnedProposal,
    ProposalKL,
    ProposalNLL,
    SelfNormalisedLikelihood,
)
from energyreg.objectives.noise_contrastive import NCE, KLDImportanceSampling, MaximumLikelihoodImportanceSampling
from energyreg.objectives.quadrature import ExactMaximumLikelihood
from energyreg.objectives.scores import DenoisingScoreMatching, MaximumLikelihoodMCMC, ScoreMatching

__all__ = [
    "DenoisingScoreMatching",
    "EnergyObjective",
    "ExactMaximumLikelihood",
    "KLDImportanceSampling",
    "LearnedProposalObjective",
    "Loss",
    "MaximumLikelihoodImportanceSampling",
    "MaximumLikelihoodMCMC",
    "MaximumLikelihoodWithLearnedProposal",
    "NCE",
    "NCEWithLearnedProposal",
    "NonFiniteLossError",
    "ProposalKL",
    "ProposalNLL",
    "ScoreMatching",
    "SelfNormalisedLikelihood",
]
