"""Short and former paths of modules: `energyreg.bases` is `energyreg.densities.bases`.

The rooms of the package say where a module lives; what users import stays as short as it was, and files that were
written for an older layout go on working.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

__all__ = ["ALIASES", "FunctionsStay", "install"]

PACKAGE = "energyreg."
ALIASES = {
    "augment": "images.augment",
    "bases": "densities.bases",
    "blocks": "tables.blocks",
    "calibration": "models.calibration",
    "chain": "models.chain",
    "chain_training": "training.chains",
    "checkpoint": "models.checkpoint",
    "demo": "cli.demo",
    "encoders": "networks.encoders",
    "energy": "inference.energy",
    "ensemble": "models.ensemble",
    "ensemble_training": "training.ensembles",
    "estimator": "estimators.table",
    "export": "models.export",
    "heads": "networks.heads",
    "image_encoders": "networks.image_encoders",
    "image_estimator": "estimators.image",
    "integrators": "inference.integrators",
    "losses": "objectives.losses",
    "mcmc": "inference.mcmc",
    "metrics": "evaluation.metrics",
    "model": "models.model",
    "noise": "densities.noise",
    "points": "inference.points",
    "predictive": "models.predictive",
    "proposals": "networks.proposals",
    "refine": "inference.ascent",
    "report": "reports.page",
    "skpro": "estimators.skpro",
    "spaces": "densities.spaces",
    "table_report": "reports.table_report",
    "tablefiles": "tables.files",
    "vision.average_precision": "vision.detection.average_precision",
    "vision.data": "vision.detection.data",
    "vision.roi_pool": "vision.pooling.roi_pool",
    "vision.rotated_pool": "vision.pooling.rotated_pool",
    "vision.small_detector": "vision.detection.small_detector",
}
"""Module below `energyreg` by its short path."""


class _AliasImporter(MetaPathFinder, InspectLoader):
    """Finds a module under its short path: the very module, not a copy."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        known = fullname.startswith(PACKAGE) and fullname.removeprefix(PACKAGE) in ALIASES
        return ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._real(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just given the module the spec of its alias.
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state

    def get_code(self, fullname: str) -> CodeType | None:
        """The code that `python -m` runs."""
        spec = importlib.util.find_spec(self._real(fullname))
        assert spec is not None and isinstance(spec.loader, InspectLoader)
        return spec.loader.get_code(spec.name)

    def get_source(self, fullname: str) -> str | None:
        spec = importlib.util.find_spec(self._real(fullname))
        assert spec is not None and isinstance(spec.loader, InspectLoader)
        return spec.loader.get_source(spec.name)

    @staticmethod
    def _real(fullname: str) -> str:
        return PACKAGE + ALIASES[fullname.removeprefix(PACKAGE)]


class FunctionsStay(ModuleType):
    """A package in which importing the module `refine` does not replace the function `refine`.

    Attributes:
        FUNCTIONS: Names of such functions.
    """

    FUNCTIONS = frozenset({"average_precision", "refine", "roi_pool", "small_detector"})

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in self.FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def install() -> None:
    """Let the import system know of the aliases; once is enough."""
    if not any(isinstance(finder, _AliasImporter) for finder in sys.meta_path):
        sys.meta_path.append(_AliasImporter())
