"""Scores of predicted densities."""

from energyreg.evaluation.compare import evaluate, evaluate_linear, permutation_importance
from energyreg.evaluation.forecasts import LinearForecast, MarginalForecast
from energyreg.evaluation.joint import JointScores, evaluate_jointly
from energyreg.evaluation.scores import LEVELS, Evaluation, RowScores, circular_crps

__all__ = [
    "LEVELS",
    "Evaluation",
    "JointScores",
    "LinearForecast",
    "MarginalForecast",
    "RowScores",
    "circular_crps",
    "evaluate",
    "evaluate_jointly",
    "evaluate_linear",
    "permutation_importance",
]
