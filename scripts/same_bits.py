"""Do a change's moves keep every number? Fit small models of every kind, and compare what they answer bit for bit.

    python -m scripts.same_bits store before   # on the code as it was: answers, and models saved by it
    python -m scripts.same_bits compare before  # on the code as it is: the same fits, and those models loaded

Run both on one machine with one version of PyTorch. `compare` prints what differs and exits with 1. The cases use
public names only, so that the script runs on either side of a change.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import energyreg as er

FEW: dict[str, Any] = {"epochs": 3, "width": 16, "depth": 1, "random_state": 0}
ROWS, TEST = 160, 12
Answers = dict[str, np.ndarray]
CASES: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {}


def case(function: Callable[[Path], Iterator[tuple[str, Any]]]) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    """Enter a case: it gets a folder to keep models in, and yields names with answers."""
    CASES[function.__name__] = function
    return function


def table(outputs: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, with a missing value, and standard targets of which both the mean and the spread depend on x."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 3))
    y = x[:, :1] + (0.3 + 0.2 * (x[:, 1:2] > 0)) * rng.normal(size=(ROWS, outputs))
    x[3, 2] = np.nan
    return x, y[:, 0] if outputs == 1 else y


def distribution(p: er.PredictiveDistribution, y: Any) -> Iterator[tuple[str, Any]]:
    """What a density answers."""
    yield "log_prob", p.log_prob(torch.as_tensor(y))
    yield from (("mean", p.mean), ("variance", p.variance), ("median", p.median), ("mode", p.mode))
    yield "interval", p.interval(0.8)
    torch.manual_seed(0)
    yield "sample", p.sample((5,))
    d = p.diagnostics
    for name in ("log_partition", "log_partition_stderr", "effective_sample_size", "pareto_k"):
        yield f"diagnostics.{name}", getattr(d, name)
    region = p.highest_density_region(0.8)
    yield "region.threshold", region.log_threshold
    if region.intervals is not None:
        yield "region.intervals", torch.cat(region.intervals)
        yield "quantile", p.quantile([0.05, 0.6])
        yield "cdf", p.cdf(torch.as_tensor(y))
    modes = p.modes()
    for name in ("values", "log_prob", "probabilities"):
        yield f"modes.{name}", torch.cat([row.reshape(len(row), -1) for row in getattr(modes, name)])


def regressor(fitted: Any, x: Any, y: np.ndarray) -> Iterator[tuple[str, Any]]:
    """What an estimator answers."""
    for kind in ("mean", "median", "mode"):
        yield kind, fitted.predict(x, kind=kind)
    yield "intervals", fitted.predict_interval(x, level=0.9)
    yield "quantiles", fitted.predict_quantiles(x, [0.1, 0.5])
    yield "scores", fitted.score_samples(x, y)
    yield "samples", fitted.sample(x, 3)
    yield "weights", np.asarray(fitted.member_weights_)
    yield "calibration", np.asarray([fitted.calibration_.inverse_temperature, fitted.calibration_.base_share])
    for name, value in distribution(fitted.predict_distribution(x), y):
        yield f"p.{name}", value


def estimator(folder: Path, name: str, y: np.ndarray, **settings: Any) -> Iterator[tuple[str, Any]]:
    """Fit an estimator, and ask it, and what its file brings back."""
    x, _ = table()
    path = folder / f"{name}.safetensors"
    fitted = er.EnergyRegressor(**{**FEW, **settings}).fit(x, y)
    yield from regressor(fitted, x[:TEST], y[:TEST])
    if not path.exists():
        fitted.save(path)
    yield from ((f"loaded.{key}", value) for key, value in regressor(er.EnergyRegressor.load(path), x[:TEST], y[:TEST]))


@case
def real(folder: Path) -> Iterator[tuple[str, Any]]:
    yield from estimator(folder, "real", table()[1], n_members=2, conformal=True)


@case
def pilots(folder: Path) -> Iterator[tuple[str, Any]]:
    yield from estimator(folder, "pilots", table()[1], base="marginal")


@case
def rounded(folder: Path) -> Iterator[tuple[str, Any]]:
    yield from estimator(folder, "rounded", np.round(table()[1], 1), n_members=1)


@case
def positive(folder: Path) -> Iterator[tuple[str, Any]]:
    yield from estimator(folder, "positive", np.exp(table()[1]), target="positive", n_members=1)


@case
def interval(folder: Path) -> Iterator[tuple[str, Any]]:
    y = 10 / (1 + np.exp(-table()[1]))
    yield from estimator(folder, "interval", y, target=("interval", 0, 10), n_members=1, calibrate=False)


@case
def circle(folder: Path) -> Iterator[tuple[str, Any]]:
    y = np.mod(60 * table()[1], 360)
    yield from estimator(folder, "circle", y, target=("circle", 0, 360), n_members=2)


@case
def count(folder: Path) -> Iterator[tuple[str, Any]]:
    y = np.random.default_rng(1).poisson(np.exp(table()[1]))
    yield from estimator(folder, "count", y, target="count", n_members=1)
    x, _ = table()
    loaded = er.EnergyRegressor.load(folder / "count.safetensors")
    yield "probabilities", loaded.predict_probabilities(x[:TEST], np.arange(4))


@case
def weighted(folder: Path) -> Iterator[tuple[str, Any]]:
    x, y = table()
    weights = np.random.default_rng(2).integers(0, 3, ROWS)
    fitted = er.EnergyRegressor(**FEW, n_members=2).fit(x, y, sample_weight=weights, eval_set=(x[:30], y[:30]))
    yield from regressor(fitted, x[:TEST], y[:TEST])


@case
def joint(folder: Path) -> Iterator[tuple[str, Any]]:
    yield from estimator(folder, "joint", table(2)[1], outputs="joint", n_members=2)


@case
def joint_of_three(folder: Path) -> Iterator[tuple[str, Any]]:
    yield from estimator(folder, "three", table(3)[1], outputs="joint", n_members=1, conformal=True)


@case
def chain(folder: Path) -> Iterator[tuple[str, Any]]:
    y = table(2)[1]
    y[:, 1] = np.exp(y[:, 1])
    yield from estimator(folder, "chain", y, target=["real", "positive"], outputs="chain", n_members=1)


@case
def ensembles(folder: Path) -> Iterator[tuple[str, Any]]:
    x, y = (torch.as_tensor(np.nan_to_num(part)) for part in table())
    for name, space, targets in (
        ("real", er.spaces.Real(), y),
        ("circle", er.spaces.Circle(6.0), y % 6),
    ):

        def build(space: Any = space) -> er.EnergyRegressionModel:
            return er.EnergyRegressionModel.for_table(3, space=space, width=16)

        ensemble = er.fit_ensemble(build, x, targets, n_members=3, epochs=2, batch_size=32, seed=1)
        yield from ((f"{name}.{key}", value) for key, value in distribution(ensemble(x[:TEST]), targets[:TEST]))
        path = folder / f"ensemble-{name}.safetensors"
        if not path.exists():
            er.save(ensemble, path)
        yield f"{name}.loaded", er.load(path)(x[:TEST]).log_prob(targets[:TEST])
        yield f"{name}.history", np.asarray([history.train_loss for history in ensemble.histories])


@case
def integrators(folder: Path) -> Iterator[tuple[str, Any]]:
    """One dimension by points, on the line, between bounds and on a circle; two by a grid."""
    x, y = (torch.as_tensor(np.nan_to_num(part)) for part in table())
    i, s = er.integrators, er.spaces
    for name, space, integrator in (
        ("line", s.Real(), i.ImportanceSampling(256)),
        ("bounds", s.Interval(-10.0, 10.0), i.StratifiedQuadrature(64)),
        ("circle", s.Circle(6.0, low=-3.0), i.ImportanceSampling(256)),
        ("plane", s.Product(s.Real(), s.Circle(6.0)), i.StratifiedQuadrature(400)),
    ):
        torch.manual_seed(0)
        model = er.EnergyRegressionModel.mixture_for_table(3, space=space, width=16)
        targets = y[:, None].expand(-1, space.dim)
        er.fit(model, x, targets, epochs=2, batch_size=32, seed=1)
        p = model(x[:TEST], integrator=integrator)
        yield from ((f"{name}.{key}", value) for key, value in distribution(p, targets[:TEST].contiguous()))


def _objectives() -> dict[str, Any]:
    noise = er.noise.GaussianNoise([[0.1], [0.3]])
    o = er.objectives
    return {
        "exact": o.ExactMaximumLikelihood(32),
        "ml-is": o.MaximumLikelihoodImportanceSampling(noise, 16),
        "kld-is": o.KLDImportanceSampling(noise, 0.1, 16),
        "nce": o.NCE(noise, 16),
        "nce+": o.NCE(noise, 16, beta=0.025),
        "sm": o.ScoreMatching(),
        "dsm": o.DenoisingScoreMatching(0.2),
        "mcmc": o.MaximumLikelihoodMCMC(4, 0.05, 4),
        "joint-nce": o.NCEWithLearnedProposal(),
        "joint-ml": o.MaximumLikelihoodWithLearnedProposal(),
        "snl": o.SelfNormalisedLikelihood(),
    }


@case
def objectives(folder: Path) -> Iterator[tuple[str, Any]]:
    x, y = (torch.as_tensor(np.nan_to_num(part)) for part in table())
    for name, objective in _objectives().items():
        torch.manual_seed(0)
        proposal = er.proposals.MixtureDensityNetwork(16, 1, 2)
        model = er.EnergyRegressionModel(
            er.encoders.VectorEncoder(3, 16), er.heads.JointHead(16, 1, width=16), proposal=proposal
        )
        history = er.fit(model, x, y, objective=objective, epochs=2, batch_size=32, seed=3)
        yield f"{name}.loss", np.asarray(history.train_loss)
        for key, value in history.diagnostics.items():
            yield f"{name}.{key}", np.asarray(value)
        yield f"{name}.weights", torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        yield f"{name}.log_prob", model(x[:TEST]).log_prob(y[:TEST])


@case
def training(folder: Path) -> Iterator[tuple[str, Any]]:
    """Settings of `fit`, a loader, weights, and a resumed run."""
    x, y = (torch.as_tensor(np.nan_to_num(part)).float() for part in table())

    def fresh() -> er.EnergyRegressionModel:
        torch.manual_seed(0)
        return er.EnergyRegressionModel.for_table(3, width=16)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y[:, None]), batch_size=40)
    for name, data, settings in (
        ("averaged", (x, y), {"averaging": 8.0, "schedule": "cosine"}),
        ("weights", (x, y), {"sample_weight": torch.arange(ROWS) % 3, "patience": 1, "schedule": "constant"}),
        ("double", (x.double(), y.double()), {"precision": "64-true", "gradient_clip": None}),
        ("mixed", (x, y), {"precision": "bf16-mixed", "validation": None}),
        ("loader", (loader,), {}),
    ):
        model = fresh()
        history = er.fit(model, *data, **{"epochs": 4, "batch_size": 32, "seed": 5, **settings})
        yield f"{name}.loss", np.asarray(history.train_loss)
        yield f"{name}.validation", np.asarray(history.validation_nll)
        yield f"{name}.weights", torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    with tempfile.TemporaryDirectory() as checkpoints:
        er.fit(fresh(), x, y, epochs=3, batch_size=32, checkpoint_dir=checkpoints)
        model = fresh()
        er.fit(model, x, y, epochs=3, batch_size=32, checkpoint_dir=checkpoints, resume=True)
        yield "resumed", model(x[:TEST]).log_prob(y[:TEST])


@case
def chains_of_samples(folder: Path) -> Iterator[tuple[str, Any]]:
    def f(y: torch.Tensor) -> torch.Tensor:
        return -(y.square() - 1).square().sum(-1)

    start = torch.zeros(4, 2)
    for name, sampler in (
        ("langevin", er.mcmc.Langevin(num_chains=3, num_steps=20, num_warmup=5, periodic=(False, True))),
        ("mala", er.mcmc.MALA(num_samples=20, num_chains=3, num_warmup=20)),
    ):
        chains = sampler.run(f, start=start, generator=torch.Generator().manual_seed(0))
        yield name, chains.samples
        yield f"{name}.rhat", chains.rhat
        yield f"{name}.step", chains.step_size
    yield "refine", er.refine(f, torch.full((4, 2), 0.2), num_steps=10)


@case
def images(folder: Path) -> Iterator[tuple[str, Any]]:
    from PIL import Image

    rng = np.random.default_rng(0)
    y = rng.uniform(0.1, 0.9, 60)
    with tempfile.TemporaryDirectory() as place:
        paths = []
        for number, value in enumerate(y):
            pixels = np.clip(255 * value + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            paths.append(str(Path(place) / f"{number:03}.png"))
            Image.fromarray(pixels).save(paths[-1])
        common = {"n_members": 2, "random_state": 0, "image_size": 32, "workers": 0, "width": 16, "depth": 1}
        backbone = {"backbone": "timm:test_resnet", "weights": None}
        torch.manual_seed(0)  # for the backbone's weights, which random_state leaves alone
        frozen = er.ImageRegressor(**common, **backbone, epochs=4, target=("interval", 0, 1)).fit(paths, y)
        yield from ((f"frozen.{name}", value) for name, value in regressor(frozen, paths[:TEST], y[:TEST]))
        path = folder / "images.safetensors"
        if not path.exists():
            frozen.save(path)
        yield "frozen.loaded", er.ImageRegressor.load(path).score_samples(paths[:TEST], y[:TEST])
        torch.manual_seed(0)
        tuned = er.ImageRegressor(**{**common, "n_members": 1}, **backbone, epochs=1, fine_tune=True)
        tuned.fit(paths, y)
        yield from ((f"tuned.{name}", value) for name, value in regressor(tuned, paths[:TEST], y[:TEST]))


@case
def detection(folder: Path) -> Iterator[tuple[str, Any]]:
    from torchvision import tv_tensors
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    class Backbone(torch.nn.Module):
        out_channels = 32

        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 32, 5, 4, 2)

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"0": self.stem(images).relu()}

    def detector() -> Any:
        torch.manual_seed(0)
        return FCOS(
            Backbone(), 3, anchor_generator=AnchorGenerator(((8.0,),), ((1.0,),)), min_size=64, max_size=96,
            score_thresh=0.0, detections_per_img=6, topk_candidates=20,
        ).eval()  # fmt: skip

    generator = torch.Generator().manual_seed(0)
    records = []
    for _ in range(6):
        image = torch.rand(3, 64, 80, generator=generator)
        corner = torch.rand(3, 2, generator=generator) * 30
        boxes = torch.cat([corner, corner + 8 + 20 * torch.rand(3, 2, generator=generator)], 1)
        target = {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(64, 80)),
                  "labels": torch.tensor([1, 2, 1])}  # fmt: skip
        records.append((image, target))
    model = er.vision.add_energy_head(detector(), width=16)
    loader = torch.utils.data.DataLoader(records, batch_size=2, collate_fn=model.collate)
    history = er.fit(model, loader, epochs=2, seed=0)
    yield "loss", np.asarray(history.train_loss)
    path = folder / "head.safetensors"
    if not path.exists():
        er.vision.save_head(model, path)
    loaded = er.vision.load_head(detector(), path)
    for name, each in (("fitted", model), ("loaded", loaded)):
        asked = er.vision.Inference(num_steps=4, num_samples=64, box_samples=3, iou_thresholds=(0.5,), voting=0.02)
        found = each.eval().detect([record[0] for record in records[:2]], asked)
        for place, one in enumerate(found):
            for key, value in one.items():
                if isinstance(value, torch.Tensor):
                    yield f"{name}.{place}.{key}", value


@case
def command_line(folder: Path) -> Iterator[tuple[str, Any]]:
    """The files that the commands write."""
    x, y = table()
    with tempfile.TemporaryDirectory() as place:
        lines = [
            "a,b,kind,y",
            *(f"{r[0]:.6f},{r[1]:.6f},{'uv'[i % 2]},{t:.6f}" for i, (r, t) in enumerate(zip(x, y, strict=True))),
        ]
        (Path(place) / "t.csv").write_text("\n".join(lines) + "\n")
        for arguments in (
            "fit t.csv --target y -o model --epochs 2 --members 2 --threads 1 --seed 0 --quiet",
            "predict model t.csv -o p.csv --level 0.9 --quiet",
            "predict model t.csv -o q.csv --quantiles 0.1,0.9 --density-at-target --quiet",
            "sample model t.csv -o s.csv --number 3 --quiet",
            "evaluate model t.csv --json",
        ):
            done = subprocess.run(
                [sys.executable, "-m", "energyreg", *arguments.split()],
                cwd=place, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        for name in ("p.csv", "q.csv", "s.csv"):
            yield name, np.frombuffer((Path(place) / name).read_bytes(), np.uint8)
        scores = json.loads(done.stdout)
        yield "e.json", np.frombuffer(json.dumps(_numbers(scores)).encode(), np.uint8)


def _numbers(value: Any) -> Any:
    """The numbers of a nested answer, without paths and times."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items() if "second" not in k and not isinstance(v, str)}
    return [_numbers(v) for v in value] if isinstance(value, list) else value


def answers(function: Callable[[Path], Iterator[tuple[str, Any]]], folder: Path) -> Answers:
    """All answers of a case as arrays."""
    found: Answers = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in function(folder):
            found[name] = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return found


def differences(before: Answers, after: Answers) -> list[str]:
    """One line for each answer that is not the same, bit for bit."""
    found = [f"{name}: only before" for name in before.keys() - after.keys()]
    found += [f"{name}: only after" for name in after.keys() - before.keys()]
    for name in sorted(before.keys() & after.keys()):
        a, b = before[name], after[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            found.append(f"{name}: {a.dtype}{a.shape} before, {b.dtype}{b.shape} after")
        elif a.tobytes() != b.tobytes():
            wide = np.abs(a.astype(float) - b.astype(float)) if a.dtype.kind in "fiu" else np.array([np.nan])
            found.append(f"{name}: differs by up to {np.nanmax(wide):.3g}")
    return found


def main() -> None:
    """Store or compare, case by case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("store", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="cases, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name, function in CASES.items():
        if options.only and name not in options.only.split(","):
            continue
        found = answers(function, options.folder)
        path = options.folder / f"{name}.npz"
        if options.action == "store":
            np.savez(path, **found)
            print(f"{name}: {len(found)} answers stored", flush=True)
            continue
        with np.load(path) as stored:
            wrong = differences(dict(stored), found)
        failed |= bool(wrong)
        print(f"{name}: " + ("; ".join(wrong[:6]) if wrong else f"{len(found)} answers, all the same"), flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
