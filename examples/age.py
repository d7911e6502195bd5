"""Ages of faces as densities: `python examples/age.py FOLDER`, with FOLDER/images and FOLDER/labels.csv (file, age).

Takes any task with one number an image: `--target steering --space real`. A column `split` (train or test) is heeded;
without it a fifth of the images is the test. Needs `pip install 'energyreg[vision,tables]'`.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image

import energyreg as er

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--images", default="images", help="folder of the images, in the folder")
parser.add_argument("--file", default="file", help="column of the file names")
parser.add_argument("--target", default="age", help="column of the targets")
parser.add_argument("--space", default="positive", help="real, positive or count")
parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0")
parser.add_argument("--weights", default="package", help="package, pretrained, a file or none")
parser.add_argument("--size", type=int, default=112, help="pixels")
parser.add_argument("--fine-tune", type=int, default=0, help="epochs; minutes each on a CPU, worth it on a GPU")
parser.add_argument("--workers", type=int, default=0, help="processes that read images")
parser.add_argument("--epochs", type=int, help="of the training on the features")
parser.add_argument("--device", default="auto")
parser.add_argument("--output", type=Path, default=Path("densities.png"))
args = parser.parse_args()
table = pd.read_csv(args.folder / "labels.csv")
split = table.get("split", pd.Series(np.where(np.random.default_rng(0).random(len(table)) < 0.8, "train", "test")))
train, test = (table[split == part] for part in ("train", "test"))

regressor = er.ImageRegressor(
    target=args.space, backbone=args.backbone, weights=None if args.weights == "none" else args.weights,
    image=args.file, folder=args.folder / args.images, image_size=args.size, fine_tune=args.fine_tune or False,
    augment=er.augment.HorizontalFlip(), cache="features", workers=args.workers, on_error="skip", conformal=True,
    epochs=args.epochs or "auto", device=args.device, random_state=0, verbose=True,
).fit(train, train[args.target])  # fmt: skip
regressor.save(args.output.with_suffix(".safetensors"))

y, (low, high) = test[args.target].to_numpy(), regressor.predict_interval(test, 0.9).T
print(f"NLL {-regressor.score_samples(test, y).mean():.3f} nats on {len(y)} images, "
      f"MAE {np.abs(regressor.predict(test, 'median') - y).mean():.2f}, "
      f"coverage {((low <= y) & (y <= high)).mean():.1%} and width {(high - low).mean():.1f} at 90 %")  # fmt: skip
shown = test.sample(min(6, len(test)), random_state=0)
grid = torch.linspace(float(y.min()), float(y.max()), 400)
density = regressor.predict_distribution(shown).log_prob(grid[:, None, None].double()).exp().cpu()
figure, axes = plt.subplots(len(shown), 2, figsize=(6, 1.6 * len(shown)), width_ratios=(1, 3), layout="constrained")
for (left, right), name, truth, p in zip(axes, shown[args.file], shown[args.target], density.T, strict=True):
    left.imshow(Image.open(args.folder / args.images / name))
    left.axis("off")
    right.fill_between(grid, p, alpha=0.4)
    right.axvline(truth, color="black", linestyle=":")
    right.set(yticks=[], xlabel=args.target)
figure.savefig(args.output, dpi=150)
