"""Fine-tune a detector and an energy head on a folder of images with boxes, and draw what they say of new images.

    python examples/detection.py --images train/ --boxes boxes.csv --output run/

The boxes are COCO's JSON, or a CSV file with the columns image, x1, y1, x2, y2, label. A part of the images is held
out: on it the average precision is reported, for the detector's boxes and for the refined ones, and some of it is drawn
into `run/pictures`: the detector's box (dashed), the refined one, twenty boxes drawn from the density around it, and
the probability that the refined box overlaps the true one by more than 0.75.

A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import energyreg as er
from energyreg.checkpoint import load_training_state, save_training_state, write_atomically
from energyreg.vision import BoxDataset, Inference, add_energy_head, average_precision

WHAT_IS_ASKED = Inference(num_samples=256, box_samples=20, iou_thresholds=(0.75,))


def read(images: Path, boxes: Path) -> BoxDataset:
    """Images and boxes, by the kind of file."""
    make = BoxDataset.from_coco if boxes.suffix == ".json" else BoxDataset.from_csv
    return make(images, boxes, drop_empty=True)


def train_detector(detector: nn.Module, data: BoxDataset, arguments: argparse.Namespace) -> None:
    """Train as torchvision's references do: SGD, and a rate that falls in the end; kept after each epoch."""
    path, done = arguments.output / "detector.safetensors", 0
    if path.exists():
        weights, state = load_training_state(path)
        detector.load_state_dict(weights)
        done = state["epochs"]
    epochs = arguments.detector_epochs
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, arguments.detector_rate, momentum=0.9, weight_decay=5e-4)
    detector.train()
    for epoch in range(done, epochs):
        torch.manual_seed(epoch)
        for group in optimizer.param_groups:
            group["lr"] = arguments.detector_rate * (0.1 if epoch >= 0.75 * epochs else 1.0)
        loader = DataLoader(data, arguments.batch_size, shuffle=True, collate_fn=lambda batch: tuple(zip(*batch)))  # noqa: B905
        total = 0.0
        for images, targets in loader:
            kept = [{name: target[name].to(arguments.device) for name in ("boxes", "labels")} for target in targets]
            losses = detector([image.to(arguments.device) for image in images], kept)
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizer.step()
            total += float(loss.detach())
        print(f"detector, epoch {epoch + 1}/{epochs}: loss {total / len(loader):.3f}", flush=True)
        save_training_state(path, detector.state_dict(), {"epochs": epoch + 1})
    detector.eval()


def draw(image: Tensor, found: dict[str, Tensor], classes: Sequence[str], least: float, path: Path) -> None:
    """The boxes with a score of at least `least`, and how sure they are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    height, width = image.shape[1:]
    figure, axes = pyplot.subplots(figsize=(8, 8 * height / width), dpi=100)
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1), extent=(0, width, height, 0))

    def frame(box: Tensor, **style: Any) -> None:
        x1, y1, x2, y2 = box.tolist()
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))

    for row in (found["scores"] >= least).nonzero()[:, 0].tolist():
        for sample in found["box_samples"][row]:
            frame(sample, color="tab:orange", linewidth=0.8, alpha=0.3)
        frame(found["detector_boxes"][row], color="white", linewidth=1.2, linestyle="--")
        frame(found["boxes"][row], color="tab:orange", linewidth=2)
        sure = float(found["iou_probabilities"][row, 0])
        kind, score = classes[int(found["labels"][row]) - 1], float(found["scores"][row])
        label = f"{kind} {score:.2f}, P(IoU > 0.75) = {sure:.2f}"
        x, y = found["boxes"][row, :2].tolist()
        axes.text(x, y - 2, label, fontsize=8, color="black", backgroundcolor=(1, 1, 1, 0.7), clip_on=True)
    axes.set_axis_off()
    figure.savefig(path, bbox_inches="tight", pad_inches=0)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, and do all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--boxes", type=Path, required=True, help="COCO's JSON or a CSV file")
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, results and pictures")
    parser.add_argument("--detector", default="fasterrcnn_mobilenet_v3_large_320_fpn", help="a model of torchvision")
    parser.add_argument("--weights", type=Path, help="state dict to start the detector from, as torch.save writes it")
    parser.add_argument("--size", type=int, default=320, help="shorter side that images are resized to, in pixels")
    parser.add_argument("--detector-epochs", type=int, default=20)
    parser.add_argument("--detector-rate", type=float, default=0.01)
    parser.add_argument("--head-epochs", type=int, default=10)
    parser.add_argument("--head-width", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--held-out", type=float, default=0.2, help="fraction of the images")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--least-score", type=float, default=0.5, help="of the boxes that are drawn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)

    data = read(arguments.images, arguments.boxes)
    train, test = data.with_boxes().split(arguments.held_out)
    train.transforms = v2.RandomHorizontalFlip()
    print(f"{data}; {len(test)} images are held out", flush=True)

    torch.manual_seed(0)
    detector = torchvision.models.get_model(
        arguments.detector, weights=None, weights_backbone=None, num_classes=data.num_classes,
        min_size=arguments.size, max_size=2 * arguments.size,
    )  # fmt: skip
    if arguments.weights is not None:
        detector.load_state_dict(torch.load(arguments.weights, weights_only=True))
    detector.to(arguments.device)
    train_detector(detector, train, arguments)

    model = add_energy_head(detector, width=arguments.head_width)
    loader = DataLoader(train, arguments.batch_size, shuffle=True, collate_fn=model.collate)
    history = er.fit(
        model, loader, epochs=arguments.head_epochs, learning_rate=1e-3, resume=True,
        checkpoint_dir=arguments.output / "head", progress=True,
    )  # fmt: skip
    print(history)

    found, targets = [], []
    for image, target in test:
        found += model.detect([image.to(arguments.device)], WHAT_IS_ASKED)
        targets.append(target)
    before = average_precision([{**each, "boxes": each["detector_boxes"]} for each in found], targets)
    after = average_precision(found, targets)
    for name in after:
        print(f"{name:5} detector {before[name]:.3f}, refined {after[name]:.3f}")
    report = json.dumps({"detector": before, "refined": after}, indent=1)
    write_atomically(arguments.output / "results.json", report.encode())

    folder = arguments.output / "pictures"
    folder.mkdir(exist_ok=True)
    for place in range(min(arguments.pictures, len(test))):
        image, target = test[place]
        boxes = {name: value.cpu() for name, value in found[place].items()}
        draw(image, boxes, data.classes, arguments.least_score, folder / f"{Path(target['image_id']).stem}.png")
    print(f"Pictures are in {folder}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
