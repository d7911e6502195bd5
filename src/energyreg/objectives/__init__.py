"""Training objectives: (f, q, y) to a loss per example."""

from energyreg.objectives.contract import (
    NCE,
    DenoisingScoreMatching,
    ExactMaximumLikelihood,
    KLDImportanceSampling,
    Loss,
    MaximumLikelihoodImportanceSampling,
    MaximumLikelihoodMCMC,
    MaximumLikelihoodWithLearnedProposal,
    NCEWithLearnedProposal,
    NonFiniteLossError,
    ProposalKL,
    ProposalNLL,
    ScoreMatching,
    SelfNormalisedLikelihood,
)

__all__ = [
    "DenoisingScoreMatching",
    "ExactMaximumLikelihood",
    "KLDImportanceSampling",
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
