"""Scores of predicted densities."""

from energyreg.evaluation.forecasts import (
    LEVELS,
    Evaluation,
    JointScores,
    LinearForecast,
    MarginalForecast,
    RowScores,
    circular_crps,
    evaluate,
    evaluate_jointly,
    evaluate_linear,
    permutation_importance,
)

__all__ = [
    "Evaluation",
    "JointScores",
    "LEVELS",
    "LinearForecast",
    "MarginalForecast",
    "RowScores",
    "circular_crps",
    "evaluate",
    "evaluate_jointly",
    "evaluate_linear",
    "permutation_importance",
]
