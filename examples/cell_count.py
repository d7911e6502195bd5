"""Counts of cells as probabilities: `python examples/cell_count.py FOLDER`, with FOLDER/images and FOLDER/labels.csv.

The table has the columns file and count; or file and dots, an image in which a pixel marks each cell, as in the VGG and
MBM cells. A column `split` (train or test) is heeded; without it a fifth of the images is the test. Needs
`pip install 'energyreg[vision,tables]'`.
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
parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0")
parser.add_argument("--weights", default="package", help="package, pretrained, a file or none")
parser.add_argument("--size", type=int, default=224, help="pixels; cells should not shrink away")
parser.add_argument("--fine-tune", type=int, default=0, help="epochs; minutes each on a CPU, worth it on a GPU")
parser.add_argument("--epochs", type=int, help="of the training on the features")
parser.add_argument("--device", default="auto")
parser.add_argument("--output", type=Path, default=Path("counts.png"))
args = parser.parse_args()

table, images = pd.read_csv(args.folder / "labels.csv"), args.folder / "images"
if "count" not in table:
    table["count"] = [er.datasets.count_dots(images / name) for name in table["dots"]]
split = table.get("split", pd.Series(np.where(np.random.default_rng(0).random(len(table)) < 0.8, "train", "test")))
train, test = (table[split == part] for part in ("train", "test"))

regressor = er.ImageRegressor(
    target="count", backbone=args.backbone, weights=None if args.weights == "none" else args.weights, image="file",
    folder=images, image_size=args.size, fine_tune=args.fine_tune or False, image_batch_size=16,
    # Neither crops nor anything that hides cells: they would change the count.
    augment=er.augment.HorizontalFlip(), cache="features", on_error="skip",
    epochs=args.epochs or "auto", device=args.device, random_state=0, verbose=True,
).fit(train, train["count"])  # fmt: skip
regressor.save(args.output.with_suffix(".safetensors"))

y, (low, high) = test["count"].to_numpy(), regressor.predict_interval(test, 0.9).T
print(f"log-probability {regressor.score_samples(test, y).mean():.3f} nats on {len(y)} images, "
      f"MAE {np.abs(regressor.predict(test, 'median') - y).mean():.2f}, "
      f"coverage {((low <= y) & (y <= high)).mean():.1%} and width {(high - low).mean():.1f} at 90 %")  # fmt: skip

shown = test.sample(min(6, len(test)), random_state=0)
values = np.arange(1.2 * table["count"].max())
p = regressor.predict_probabilities(shown, values)
figure, axes = plt.subplots(len(shown), 2, figsize=(6, 1.6 * len(shown)), width_ratios=(1, 3), layout="constrained")
for (left, right), name, truth, chances in zip(axes, shown["file"], shown["count"], p, strict=True):
    left.imshow(Image.open(images / name))
    left.axis("off")
    right.bar(values, chances, width=1)
    right.axvline(truth, color="black", linestyle=":")
    right.set(yticks=[], xlabel="count")
figure.savefig(args.output, dpi=150)
