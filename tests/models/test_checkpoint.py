"""Saved models come back bit-equal; anything else is refused with an error that says why."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import energyreg as er
from energyreg import files
from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase
from energyreg.models import checkpoint
from energyreg.networks.encoders import TableEncoder, TwinEncoder
from energyreg.networks.heads import JointHead, SelfNormalisedHead, SeparableHead
from energyreg.networks.proposals import DistributionProposal, MixtureDensityNetwork


class Encoder(nn.Module):
    """An encoder that is not the library's."""

    def __init__(self, features: int = 3, width: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(features, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


class OtherEncoder(Encoder):
    pass


class Gaussian(nn.Module):
    """A conditional distribution that is not the library's."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)

    def forward(self, context: Tensor) -> torch.distributions.Distribution:
        mean, log_scale = self.layer(context).chunk(2, -1)
        return torch.distributions.Independent(torch.distributions.Normal(mean, log_scale.exp()), 1)


def joint_3d() -> er.EnergyRegressionModel:
    space = er.spaces.Product(er.spaces.Real(1), er.spaces.Circle(360.0), er.spaces.Interval(-5.0, 5.0))
    return er.EnergyRegressionModel.for_table(3, space, width=8, num_components=2)


def lebesgue() -> er.EnergyRegressionModel:
    proposal = MixtureDensityNetwork(8, num_components=2)
    return er.EnergyRegressionModel(
        TableEncoder(3, 8), JointHead(8), proposal=proposal, base=Lebesgue(), detach_context=True
    )


def low_rank() -> er.EnergyRegressionModel:
    proposal = MixtureDensityNetwork(8, dim=2, num_components=2, rank=1)
    base = ProposalBase(Marginal(2), detach=False)
    return er.EnergyRegressionModel(
        TableEncoder(3, 8), SeparableHead(8, 2), proposal=proposal, base=base, space=er.spaces.Real(2)
    )


def twin(encoder: nn.Module | None = None) -> er.EnergyRegressionModel:
    return er.EnergyRegressionModel(
        TwinEncoder(TableEncoder(3, 8) if encoder is None else encoder, TableEncoder(3, 6, depth=1)),
        SelfNormalisedHead(JointHead(8), 8),
        proposal=MixtureDensityNetwork(6, num_components=2),
    )


MODELS = {
    "twin encoder, self-normalised head": twin,
    "table": lambda: er.EnergyRegressionModel.for_table(3, width=8),
    "positive": lambda: er.EnergyRegressionModel.for_table(3, er.spaces.Positive(), width=8),
    "mixture": lambda: er.EnergyRegressionModel.mixture_for_table(3, num_components=2, width=8),
    "joint, three dimensions": joint_3d,
    "no base": lebesgue,
    "low rank, two dimensions": low_rank,
    "double": lambda: er.EnergyRegressionModel.for_table(3, width=8).double(),
}


def scrambled(model: er.EnergyRegressionModel) -> er.EnergyRegressionModel:
    """The model as if trained: fitted, and no weight at its initial value."""
    generator = torch.Generator().manual_seed(1)
    y = 1 + torch.rand(200, model.space.dim, generator=generator, dtype=torch.double)
    model.fit_preprocessing(torch.randn(200, 3, generator=generator), y)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


def data(model: er.EnergyRegressionModel) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 3, generator=generator)
    return x, 1 + torch.rand(20, model.space.dim, generator=generator, dtype=torch.double)


def log_prob(model: er.EnergyRegressionModel) -> Tensor:
    x, y = data(model)
    return model(x).log_prob(y)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return er.save(scrambled(MODELS["table"]()), tmp_path / "model")


# Round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_gives_bit_equal_log_prob(name: str, tmp_path: Path) -> None:
    model = scrambled(MODELS[name]())
    path = er.save(model, tmp_path / "model")
    loaded = er.load(tmp_path / "model")
    assert path == tmp_path / "model.safetensors"
    assert loaded.dtype == model.dtype
    assert not loaded.training
    assert str(loaded) == str(model)
    assert torch.equal(log_prob(loaded), log_prob(model))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value) and loaded.state_dict()[key].dtype == value.dtype


def test_untrained_model_can_be_saved(tmp_path: Path) -> None:
    model = MODELS["table"]().eval()
    loaded = er.load(er.save(model, tmp_path / "model"))
    assert not loaded.fitted
    assert torch.equal(log_prob(loaded), log_prob(model))


@pytest.mark.parametrize("name", ["model", "model.safetensors", "model.v2", "new/folder/model"])
def test_suffix_is_the_same_for_save_and_load(name: str, tmp_path: Path) -> None:
    path = er.save(MODELS["table"](), tmp_path / name)
    assert path.name.endswith(".safetensors") and not path.name.endswith(".safetensors.safetensors")
    er.load(tmp_path / name)
    er.load(str(path))


def test_loading_leaves_the_global_random_state(saved: Path) -> None:
    before = torch.get_rng_state()
    er.load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_leaves_no_other_file_and_readable_permissions(saved: Path) -> None:
    assert list(saved.parent.iterdir()) == [saved]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~mask


def test_non_finite_and_nested_arguments_survive(tmp_path: Path) -> None:
    state = {"a": [1, -2.5, float("inf"), (None, True)], "b": {"float": "inf", "class": [float("-inf")]}, "c": "text"}
    tensors = {"t": torch.arange(3), "empty": torch.zeros(0, 4), "scalar": torch.tensor(1.5, dtype=torch.bfloat16)}
    checkpoint.save_training_state(tmp_path / "state.safetensors", tensors, state)
    tensors_back, state_back = checkpoint.load_training_state(tmp_path / "state.safetensors")
    assert state_back == state
    assert all(torch.equal(tensors_back[name], tensor) for name, tensor in tensors.items())


def test_shared_parts_stay_shared() -> None:
    head = SeparableHead(8)
    described = checkpoint._describe([head, head], "model", {})
    first, second = checkpoint._Builder({}).build(described)
    assert first is second


def test_tied_weights_are_stored(tmp_path: Path) -> None:
    encoder = Encoder(8, 8)
    model = er.EnergyRegressionModel(nn.Sequential(Encoder(), encoder, encoder), SeparableHead(8))
    model.fit_preprocessing(None, torch.randn(50))
    own = nn.Sequential(Encoder(), tied := Encoder(8, 8), tied)
    loaded = er.load(er.save(model.eval(), tmp_path / "model"), encoder=own)
    assert torch.equal(log_prob(loaded), log_prob(model))
    assert own[1].layer.weight is own[2].layer.weight


# Parts of the user's own ------------------------------------------------------------------------------------------


@pytest.fixture
def own_encoder(tmp_path: Path) -> tuple[er.EnergyRegressionModel, Path]:
    model = er.EnergyRegressionModel(Encoder(), SeparableHead(8))
    model.fit_preprocessing(None, torch.randn(50))
    return model.eval(), er.save(model, tmp_path / "model")


def test_own_encoder_is_handed_over(own_encoder: tuple[er.EnergyRegressionModel, Path]) -> None:
    model, path = own_encoder
    encoder = Encoder()
    loaded = er.load(path, encoder=encoder)
    assert loaded.encoder is encoder
    assert torch.equal(log_prob(loaded), log_prob(model))


def test_own_encoder_keeps_its_dtype(tmp_path: Path) -> None:
    model = er.EnergyRegressionModel(Encoder(), SeparableHead(8)).double()
    model.fit_preprocessing(None, torch.randn(50))
    loaded = er.load(er.save(model.eval(), tmp_path / "model"), encoder=Encoder())
    assert loaded.dtype == torch.double
    assert torch.equal(log_prob(loaded), log_prob(model))


def test_missing_own_encoder_is_named(own_encoder: tuple[er.EnergyRegressionModel, Path]) -> None:
    with pytest.raises(
        er.CheckpointError, match=r"model\.encoder is a .*Encoder.*pass it as load\(\.\.\., encoder=\.\.\.\)"
    ):
        er.load(own_encoder[1])


def test_wrong_own_encoder_is_named(own_encoder: tuple[er.EnergyRegressionModel, Path]) -> None:
    with pytest.raises(
        er.CheckpointError, match=r"the encoder was a .*\.Encoder, but load\(\) was given a .*OtherEncoder"
    ):
        er.load(own_encoder[1], encoder=OtherEncoder())


def test_own_encoder_of_another_size_is_named(own_encoder: tuple[er.EnergyRegressionModel, Path]) -> None:
    encoder = Encoder(features=4)
    before = encoder.layer.weight.clone()
    with pytest.raises(
        er.CheckpointError, match=r"'encoder.layer.weight' has shape \(8, 3\) in the file, but \(8, 4\)"
    ):
        er.load(own_encoder[1], encoder=encoder)
    assert torch.equal(encoder.layer.weight, before)


def test_part_that_the_file_describes_is_not_handed_over(saved: Path) -> None:
    with pytest.raises(er.CheckpointError, match=r"describes its head itself\. Leave head= out"):
        er.load(saved, head=SeparableHead(8))


def test_own_module_inside_a_part_asks_for_the_whole_part(tmp_path: Path) -> None:
    model = er.EnergyRegressionModel(
        TableEncoder(3, 8),
        None,
        proposal=DistributionProposal(Gaussian()),
        base=ProposalBase(),
        space=er.spaces.Real(1),
    )
    scrambled(model)
    path = er.save(model, tmp_path / "model")
    with pytest.raises(er.CheckpointError, match=r"proposal\.module is a .*Gaussian.*the whole proposal as load"):
        er.load(path)
    loaded = er.load(path, proposal=DistributionProposal(Gaussian()))
    assert torch.equal(log_prob(loaded), log_prob(model))


# What is not a model of ours --------------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no such file.*model\.safetensors"):
        er.load(tmp_path / "model")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a folder of that name without the suffix exists"):
        er.load(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(er.CheckpointError, match=r"model\.safetensors.*it is a folder"):
        er.load(tmp_path / "model")
    with pytest.raises(OSError, match="Cannot write"):
        er.save(MODELS["table"](), tmp_path / "model")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"\x80\x04 a pickle", b"x" * 1000])
def test_file_of_another_kind(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(er.CheckpointError, match=r"model\.safetensors.*not a complete safetensors file"):
        er.load(tmp_path / "model")


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_truncated_file(fraction: float, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(er.CheckpointError, match=r"model\.safetensors.*not a complete safetensors file"):
        er.load(saved)


def test_every_flipped_byte_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    header = int.from_bytes(content[:8], "little")
    places = [*range(0, 8 + header, 97), 8 + header - 1, 8 + header, len(content) // 2, len(content) - 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x04
        saved.write_bytes(damaged)
        with pytest.raises(er.CheckpointError, match=r"model\.safetensors"):
            er.load(saved)


def test_foreign_safetensors_file(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(er.CheckpointError, match=r"none that energyreg wrote"):
        er.load(tmp_path / "model")


def rewritten(path: Path, *, config: object = None, tensors: dict[str, Tensor] | None = None, **metadata: str) -> Path:
    """The file with other content and a valid checksum, as somebody with bad intentions would write it."""
    with safetensors.safe_open(path, framework="pt") as file:
        old = file.metadata()
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    new = {**old, **metadata}
    if config is not None:
        new["config"] = config if isinstance(config, str) else json.dumps(config)
    stored = stored if tensors is None else tensors
    new["sha256"] = files.digest(stored, new)
    path.write_bytes(safetensors.torch.save(stored, new))
    return path


def config_of(path: Path) -> dict:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"])


def test_unknown_version_is_named(saved: Path) -> None:
    with pytest.raises(er.CheckpointError, match=r"format version '7' \(written by energyreg 9\.0\).*Update energyreg"):
        er.load(rewritten(saved, format_version="7", energyreg_version="9.0"))


def test_training_state_and_model_are_told_apart(saved: Path, tmp_path: Path) -> None:
    checkpoint.save_training_state(tmp_path / "last.safetensors", {}, {})
    with pytest.raises(er.CheckpointError, match=r"a training state.*resume=True"):
        er.load(tmp_path / "last")
    with pytest.raises(er.CheckpointError, match="not a training state"):
        checkpoint.load_training_state(saved)


@pytest.mark.parametrize("name", ["Transformer", "os.system", "builtins.eval", "Linear", "EnergyRegressor"])
def test_class_that_we_do_not_know_is_never_made(name: str, saved: Path) -> None:
    config = config_of(saved)
    config["args"]["head"]["class"] = name
    with pytest.raises(er.CheckpointError, match=rf"model\.head is of the class '{name}'"):
        er.load(rewritten(saved, config=config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_features": -1}, r"model\.encoder cannot be built as a TableEncoder: num_features is -1"),
        ({"num_features": "three"}, "cannot be built"),
        ({"depth": {"what": 1}}, "is described by .* cannot read"),
        ({"depth": {"same": 99}}, "is described by .* cannot read"),
        ({"surprise": 1}, "with the argument 'surprise'"),
        ({"context_dim": 9}, r"has shape \(8, 99\) in the file, but \(9, 99\) in the model"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str, saved: Path) -> None:
    config = config_of(saved)
    config["args"]["encoder"]["args"] |= change
    if "context_dim" in change:
        config["args"]["head"]["args"]["context_dim"] = 9
    with pytest.raises(er.CheckpointError, match=message):
        er.load(rewritten(saved, config=config))


@pytest.mark.parametrize("config", ["{", "[" * 100_000, "[]", "3", '{"class": "EnergyRegressionModel"}', '"text"'])
def test_description_that_is_none(config: str, saved: Path) -> None:
    with pytest.raises(er.CheckpointError, match=r"model\.safetensors"):
        er.load(rewritten(saved, config=config))


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that is made somewhere else than on the device "meta"."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor) and not result.is_meta:
            self.numbers = max(self.numbers, result.untyped_storage().nbytes() // result.element_size())
        return result


def sized(path: Path, **sizes: object) -> Path:
    """The file with other sizes, by the names of arguments, wherever the description has them."""

    def change(node: object) -> None:
        children = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
        if isinstance(node, dict):
            node |= {name: value for name, value in sizes.items() if name in node}
        for child in children:
            change(child)

    config = config_of(path)
    change(config)
    return rewritten(path, config=config)


@pytest.mark.parametrize(
    "sizes",
    [
        {"context_dim": 25_000}, {"num_features": 20_000}, {"width": 30_000}, {"channels": 50_000},
        {"num_knots": 60_000}, {"num_components": 60_000}, {"num_frequencies": 50_000}, {"dim": 10_000},
        {"context_dim": 10**9}, {"depth": 10**9}, {"depth": 60_000}, {"dim": 10**10}, {"num_features": 10**30},
        {"num_components": 10**400},
    ],
)  # fmt: skip
def test_sizes_are_compared_with_the_tensors_before_memory_is_taken(sizes: dict, saved: Path) -> None:
    numbers = sum(tensor.numel() for tensor in safetensors.torch.load_file(saved).values())
    path = sized(saved, **sizes)
    with LargestTensor() as largest, pytest.raises(er.CheckpointError, match=r"model\.safetensors"):
        er.load(path)
    assert largest.numbers <= max(numbers, path.stat().st_size)


def test_a_model_of_far_more_members_than_tensors_ends_soon(tmp_path: Path) -> None:
    path = er.save(er.EnergyEnsemble([MODELS["table"](), MODELS["table"]()]), tmp_path / "model")
    config = config_of(path)
    for members in ([config["args"]["members"][0], *[{"same": 1}] * 100_000], config["args"]["members"] * 300):
        config["args"]["members"] = members
        with pytest.raises(er.CheckpointError, match="far larger model than the file has tensors for"):
            er.load(rewritten(path, config=config))
    deep = config["args"]["members"][0]["args"]["head"]
    for _ in range(200):
        deep = {"class": "SelfNormalisedHead", "id": 0, "args": {"head": deep, "context_dim": 8}}
    config["args"]["members"][0]["args"]["head"] = deep
    with pytest.raises(er.CheckpointError):
        er.load(rewritten(path, config=config))


def no_input_or_output(*arguments: object, **_: object) -> None:
    raise AssertionError(f"a file made the library open {arguments}")


@pytest.mark.parametrize("weights", ["pretrained", "package", "/etc/shadow", "https://example.org/a.pth"])
def test_a_file_cannot_name_a_place_to_read_from(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    encoder = er.ImageEncoder("timm:test_resnet")
    path = er.save(er.EnergyRegressionModel(encoder, SeparableHead(encoder.num_features)), tmp_path / "model")
    config = config_of(path)
    assert "weights" not in config["args"]["encoder"]["args"]
    er.load(path)
    config["args"]["encoder"]["args"]["weights"] = None  # as older files have it
    er.load(rewritten(path, config=config))
    config["args"]["encoder"]["args"]["weights"] = weights
    path = rewritten(path, config=config)
    monkeypatch.setattr("socket.socket.connect", no_input_or_output)
    monkeypatch.setattr("torch.load", no_input_or_output)
    monkeypatch.setattr("pathlib.Path.is_file", no_input_or_output)
    with pytest.raises(er.CheckpointError, match=r"encoder is a ImageEncoder with weights = .*cannot name others"):
        er.load(path)


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(saved: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load(saved.read_bytes())
    for name in ("head.context_map.weight", "base.cdf_table"):
        damaged = {**tensors, name: tensors[name].clone().fill_(torch.nan)}
        with pytest.raises(er.CheckpointError, match=rf"Cannot load .*'{name}' has values that are not finite"):
            er.load(rewritten(saved, tensors=damaged))
    model = MODELS["table"]()
    model.head.context_map.weight.data[0, 0] = torch.inf
    with pytest.raises(er.CheckpointError, match=r"Cannot save: 'head\.context_map\.weight' has values"):
        er.save(model, tmp_path / "other")


def test_tensors_of_another_shape_or_type_are_named(saved: Path) -> None:
    tensors = safetensors.torch.load(saved.read_bytes())
    for name, tensor, message in (
        ("space.loc", torch.zeros(2, dtype=torch.double), r"'space.loc' has shape \(2,\) in the file, but \(1,\)"),
        ("space.fitted", torch.tensor(1.0), r"'space.fitted' has type torch.float32 in the file, but torch.bool"),
        ("head.context_map.bias", tensors["head.context_map.bias"].int(), "has type torch.int32"),
    ):
        with pytest.raises(er.CheckpointError, match=message):
            er.load(rewritten(saved, tensors={**tensors, name: tensor}))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.symlink("/dev/zero", tmp_path / "zero.safetensors")
    for name in ("pipe", "zero"):
        with pytest.raises(er.CheckpointError, match=r"it is a pipe or a device; expected a file"):
            er.load(tmp_path / name)


def test_a_file_that_shrinks_while_it_is_read_is_no_fault(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped into memory it would end the process by SIGBUS."""
    real = safetensors.torch.load

    def shrink_first(content: bytes) -> dict[str, Tensor]:
        os.truncate(saved, 100)
        return real(content)

    monkeypatch.setattr(safetensors.torch, "load", shrink_first)
    er.load(saved)
    with pytest.raises(er.CheckpointError, match="not a complete safetensors file"):
        er.load(saved)


def test_missing_and_unexpected_tensors_are_named(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    with pytest.raises(er.CheckpointError, match=r"tensor 'surprise'.*is not part of the model"):
        er.load(rewritten(saved, tensors={**tensors, "surprise": torch.zeros(1)}))
    del tensors["head.context_map.bias"]
    with pytest.raises(er.CheckpointError, match=r"no tensor 'head\.context_map\.bias'"):
        er.load(rewritten(saved, tensors=tensors))


# Saving that fails ------------------------------------------------------------------------------------------------


def test_saving_something_else_is_refused(tmp_path: Path) -> None:
    class Mine(er.EnergyRegressionModel):
        pass

    with pytest.raises(er.CheckpointError, match="was given a Linear; expected an EnergyRegressionModel"):
        er.save(nn.Linear(1, 1), tmp_path / "model")  # type: ignore[arg-type]
    with pytest.raises(er.CheckpointError, match="was given a Mine"):
        er.save(Mine(Encoder(), SeparableHead(8)), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_argument_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    model = MODELS["table"]()
    model.encoder.dropout = torch.tensor(0.5)  # type: ignore[assignment]
    with pytest.raises(er.CheckpointError, match=r"model\.encoder\.dropout is a Tensor"):
        er.save(model, tmp_path / "model")


class FullDisk:
    """A file on a disk with no room left."""

    def __init__(self, file: object) -> None:
        self.file = file

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()  # type: ignore[attr-defined]

    def write(self, content: bytes) -> None:
        self.file.write(content[:100])  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failure", ["full", "read-only", "interrupted"])
def test_failed_write_leaves_the_old_file_and_no_other(
    failure: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def replace(*_: object) -> None:
        raise KeyboardInterrupt

    def refuse(path: Path, mode: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    if failure == "full":
        monkeypatch.setattr(files, "open", lambda path, mode: FullDisk(open(path, mode)), raising=False)  # noqa: SIM115
    elif failure == "read-only":
        monkeypatch.setattr(files, "open", refuse, raising=False)
    else:
        monkeypatch.setattr(os, "replace", replace)
    expected = KeyboardInterrupt if failure == "interrupted" else OSError
    with pytest.raises(expected) as caught:
        er.save(scrambled(MODELS["table"]()), saved)
    if expected is OSError:
        assert {"full": "the disk is full", "read-only": "the file system is read-only"}[failure] in str(caught.value)
        assert str(saved) in str(caught.value)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="a part of the path is a file"):
        er.save(MODELS["table"](), tmp_path / "file" / "model")


def test_proposal_of_a_loaded_twin_model_is_that_of_the_saved_one(tmp_path: Path) -> None:
    model = scrambled(twin())
    loaded = er.load(er.save(model, tmp_path / "model"))
    # In a fresh model that has encoded nothing yet, too.
    assert torch.equal(log_prob(loaded.proposal_model()), log_prob(model.proposal_model()))
    # The proposal as a model of its own can be saved like any other.
    alone = er.load(er.save(model.proposal_model().eval(), tmp_path / "alone"))
    assert torch.equal(log_prob(alone), log_prob(model.proposal_model()))


def test_own_encoder_inside_a_twin_asks_for_the_whole_twin(tmp_path: Path) -> None:
    model = scrambled(twin(Encoder()))
    path = er.save(model, tmp_path / "model")
    with pytest.raises(er.CheckpointError, match="pass the whole encoder as load"):
        er.load(path)
    loaded = er.load(path, encoder=TwinEncoder(Encoder(), TableEncoder(3, 6, depth=1)))
    assert torch.equal(log_prob(loaded), log_prob(model))


def test_slabs_and_standardised_coordinates_come_back(tmp_path):
    torch.manual_seed(0)
    base = er.bases.ProposalBase(er.bases.Marginal(slabs=[(0.5, 0.6), (-0.1, 0.1)]), standardised=True)
    model = er.EnergyRegressionModel(
        er.encoders.VectorEncoder(2, 8), er.heads.SeparableHead(8), proposal=er.proposals.MixtureDensityNetwork(8),
        base=base,
    )  # fmt: skip
    model.fit_preprocessing(torch.randn(50, 2), torch.randn(50))
    loaded = er.load(er.save(model.eval(), tmp_path / "model"))
    assert loaded.base.standardised and loaded.base.reference.slabs == ((-0.1, 0.1), (0.5, 0.6))
    x, y = torch.randn(4, 2), torch.tensor([0.0, 0.55, 2.0, -1.0])
    assert torch.equal(loaded(x).log_prob(y), model(x).log_prob(y))


def test_a_positive_target_of_an_earlier_version_stays_a_logarithm(tmp_path):
    """The knee came later: a file without it holds a model that was without."""
    model = er.EnergyRegressionModel.for_table(2, er.spaces.Positive(), width=8)
    model.fit_preprocessing(torch.randn(50, 2), torch.rand(50) + 0.1)
    path = er.save(model.eval(), tmp_path / "model")
    assert er.load(path).space.knee == model.space.knee < 1.2
    tensors = safetensors.torch.load_file(path)
    del tensors["space.knee"]
    old = er.load(rewritten(path, tensors=tensors))
    y = torch.tensor([[100.0]], dtype=torch.float64)
    torch.testing.assert_close(old.space.to_model(y) * old.space.scale + old.space.loc, y.log())
