"""Head poses as densities: `python examples/head_pose.py FOLDER`: images/ and labels.csv (file, yaw, pitch, roll).

Angles are in degrees, signs as in AFLW2000. With a column group, a person or a sequence, none is on both sides of the
split. `--features TRAIN.npz TEST.npz` takes features, not images. Needs `pip install 'energyreg[vision,tables]'`.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

import energyreg as er

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
source = parser.add_mutually_exclusive_group(required=True)
source.add_argument("folder", type=Path, nargs="?")
source.add_argument("--features", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0")
parser.add_argument("--weights", default="package", help="package, pretrained, a file or none")
parser.add_argument("--fine-tune", type=int, default=0, help="epochs")
parser.add_argument("--epochs", type=int, help="of the training on the features")
parser.add_argument("--output", type=Path, default=Path("poses.png"))
args = parser.parse_args()
names = ["yaw", "pitch", "roll"]
settings = {"target": [("circle", -180, 180)] * 3, "epochs": args.epochs or "auto", "random_state": 0, "verbose": True}
if args.features:
    train, test = (er.datasets.load_headpose_features(path, units="degrees") for path in args.features)
    x, y, x_test, y_test = train.x, train.targets, test.x, test.targets
    regressor = er.EnergyRegressor(**settings)
else:
    table = pd.read_csv(args.folder / "labels.csv")
    group = table.get("group", table["file"]).astype(str).to_numpy()
    parts = [table.iloc[part] for part in er.datasets.split_by_group(group)]
    (x, y), (x_test, y_test) = ((part["file"].to_numpy(), part[names].to_numpy()) for part in parts)
    moves = er.augment.Compose([er.augment.HorizontalFlip.pose(), er.augment.Rotate.pose(10, units="degrees")])
    regressor = er.ImageRegressor(
        **settings, backbone=args.backbone, weights=None if args.weights == "none" else args.weights, on_error="skip",
        folder=args.folder / "images", fine_tune=args.fine_tune or False, augment=moves,
        cache="features",
    )  # fmt: skip
regressor.fit(x, y).save(args.output.with_suffix(".safetensors"))
error = (regressor.predict(x_test) - y_test + 180) % 360 - 180
print(f"log-density {regressor.score_samples(x_test, y_test).mean():.3f} nats per degree³ on {len(y_test)} heads, "
      f"MAE {dict(zip(names, np.abs(error).mean(0).round(2).tolist(), strict=True))}°")  # fmt: skip
shown = np.random.default_rng(0).choice(len(y_test), min(5, len(y_test)), replace=False)
draws = regressor.sample(x_test[shown], 1000)
figure, axes = plt.subplots(len(shown), 4, figsize=(9, 1.6 * len(shown)), layout="constrained", squeeze=False)
for row, place in enumerate(shown):
    if args.folder:
        axes[row, 0].imshow(Image.open(args.folder / "images" / x_test[place]))
    axes[row, 0].axis("off")
    for axis, name, angles, truth in zip(axes[row, 1:], names, draws[row].T, y_test[place], strict=True):
        axis.hist(angles, bins=72, density=True, alpha=0.5)
        axis.axvline(truth, color="black", linestyle=":")
        axis.set(yticks=[], xlabel=f"{name} (°)")
figure.savefig(args.output, dpi=150)
