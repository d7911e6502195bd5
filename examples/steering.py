"""Steering as probabilities: `python examples/steering.py FOLDER`: images/ and labels.csv (file, angle).

Angles are from -1 to 1. Frames are video: a fifth of the blocks of time is the test, never frames at random (columns
session and index, where there are any, say their order). Rounded angles form a lattice: 0 and ±1, which a game pad
gives again and again, have probabilities like all others. Needs `pip install 'energyreg[vision,tables]'`.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

import energyreg as er

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--target", default="angle", help="column of the steering")
parser.add_argument("--block", type=float, default=100, help="frames of a block of time")
parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0")
parser.add_argument("--weights", default="package", help="package, pretrained, a file or none")
parser.add_argument("--size", type=int, default=112, help="pixels")
parser.add_argument("--fine-tune", type=int, default=0, help="epochs; minutes each on a CPU, worth it on a GPU")
parser.add_argument("--mirror", action="store_true", help="flip images and steering in it; not with traffic")
parser.add_argument("--epochs", type=int, help="of the training on the features")
parser.add_argument("--device", default="auto")
parser.add_argument("--output", type=Path, default=Path("steering.png"))
args = parser.parse_args()

table = pd.read_csv(args.folder / "labels.csv").round({args.target: 2})
session, time = table.get("session", pd.Series("", table.index)), table.get("index", pd.Series(table.index))
rows = er.datasets.split_by_blocks(time, args.block, gap=args.block / 10, groups=session.astype(str).to_numpy())
train, test = (table.iloc[part] for part in rows)

regressor = er.ImageRegressor(
    target=("interval", -1, 1), backbone=args.backbone, weights=None if args.weights == "none" else args.weights,
    image="file", folder=args.folder / "images", image_size=args.size, fine_tune=args.fine_tune or False,
    augment=er.augment.HorizontalFlip.steering() if args.mirror else None, cache="features", on_error="skip",
    epochs=args.epochs or "auto", device=args.device, random_state=0, verbose=True,
).fit(train, train[args.target])  # fmt: skip
regressor.save(args.output.with_suffix(".safetensors"))

y, values = test[args.target].to_numpy(), np.arange(-100, 101) / 100
p = regressor.predict_probabilities(test, values)
print(f"log-density {regressor.score_samples(test, y).mean():.3f} nats on {len(y)} frames, "
      f"MAE {np.abs(regressor.predict(test, 'median') - y).mean():.3f}; P(-1), P(0), P(1): "
      f"{p[:, ::100].mean(0).round(2)}, observed {(y[:, None] == [-1, 0, 1]).mean(0).round(2)}")  # fmt: skip
shown = np.linspace(0, len(test) - 1, 6, dtype=int)
figure, axes = plt.subplots(len(shown), 2, figsize=(6, 1.6 * len(shown)), width_ratios=(1, 3), layout="constrained")
for (left, right), row in zip(axes, shown, strict=True):
    left.imshow(Image.open(args.folder / "images" / test["file"].iloc[row]))
    left.axis("off")
    right.bar(values, p[row], width=0.01)
    right.axvline(y[row], color="black", linestyle=":")
    right.set(yticks=[], xlabel=args.target, xlim=(-1.05, 1.05))
figure.savefig(args.output, dpi=150)
