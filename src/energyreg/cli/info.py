"""`energyreg info`: what a model file holds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from energyreg import files
from energyreg.cli.console import print_json
from energyreg.cli.model_file import Fitted, about_training, load
from energyreg.cli.options import Json, Model
from energyreg.files import with_suffix

__all__ = ["describe", "info"]


def describe(fitted: Fitted) -> dict[str, Any]:
    """What there is to tell of a fitted estimator, as plain data."""
    regressor, facts = fitted.regressor, fitted.facts
    kinds = fitted.kinds
    history = regressor.history_
    return {
        "targets": facts.get("targets"),
        "target_kind": regressor.target if isinstance(regressor.target, (str, list, tuple)) else repr(regressor.target),
        "columns": {name: fitted.shown_kind or kinds[name] for name in fitted.columns or []}
        or regressor.n_features_in_,
        "rows": facts.get("rows"),
        "data": facts.get("data"),
        **about_training(regressor),
        "best_epoch": history.best_epoch,
        "validation_nll": history.best_validation_nll,
        "interrupted": any(one.interrupted for one in regressor.histories_),
        "rounding": regressor.lattice_step_,
        "conformal": hasattr(regressor, "conformal_regions_"),
        "settings": {
            name: value for name, value in regressor.get_params(deep=False).items() if name != "target"
        },
        "parameters": sum(parameter.numel() for parameter in regressor.model_.parameters()),
        "version": facts.get("version"),
    }  # fmt: skip


def info(model: Model, as_json: Json = False) -> None:
    """Tell what a model file holds."""
    about = {"model": str(with_suffix(model)), **(_stored(model) or describe(load(model)))}
    if as_json:
        print_json(about)
        return
    width = max(map(len, about))
    for name, value in about.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        plain = value is None or isinstance(value, bool)
        shown = {None: "unknown", True: "yes", False: "no"}[value] if plain else value
        typer.echo(f"{name.replace('_', ' '):{width}}  {shown}")


def _stored(model: Path) -> dict[str, Any] | None:
    """What `fit` has written of the model into its file, which is read without torch; None where it has not."""
    if not with_suffix(model).exists():
        return None
    metadata = files.read_metadata(with_suffix(model), files.ESTIMATOR)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        about = json.loads(json.loads((metadata or {})["state"])["dict"]["table"]["dict"]["about"])
        return about if isinstance(about, dict) else None
    return None
