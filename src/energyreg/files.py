"""Files that appear whole or not at all, and tensors in safetensors files with a checksum."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import importlib.metadata
import json
import os
import secrets
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:  # the command line writes files, and reads errors of this module, before it needs torch
    from torch import Tensor, nn

__all__ = [
    "BOX_HEAD",
    "ESTIMATOR",
    "MODEL",
    "TRAINING_STATE",
    "CheckpointError",
    "check_room",
    "digest",
    "fingerprint",
    "read_metadata",
    "read_tensors",
    "remove_abandoned",
    "reserve",
    "temporary_path",
    "version",
    "with_suffix",
    "write_atomically",
    "write_tensors",
    "writing_error",
]


SUFFIX = ".safetensors"
MODEL = "energyreg"
TRAINING_STATE = "energyreg-training-state"
ESTIMATOR = "energyreg-estimator"
BOX_HEAD = "energyreg-box-head"
FORMAT_VERSION = "1"
TORCH_NAMES = {
    "F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16",
    "I64": "torch.int64", "I32": "torch.int32", "I16": "torch.int16", "I8": "torch.int8", "U8": "torch.uint8",
    "BOOL": "torch.bool",
}  # fmt: skip
"""Types of numbers as safetensors and as torch call them."""


class CheckpointError(ValueError):
    """A file that cannot be loaded, or a model that cannot be saved; the message names the file and what is wrong."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there completely or not at all; an older one stays until then.

    Args:
        path: File to write; missing folders are created.
        content: What to write.

    Raises:
        OSError: If it cannot be written, with the path and a reason that the user can act on.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise writing_error(path, error, len(content)) from error
        raise


def temporary_path(path: Path) -> Path:
    """Where this process writes a file until it is complete: beside it, hidden, with the host and the process."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_abandoned(path: Path) -> None:
    """Remove what processes of this host that were killed have left beside a file; see :func:`temporary_path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(_host())}-*-*.tmp"):
        process = left.name.rsplit("-", 2)[1]
        with contextlib.suppress(OSError):
            if process.isdigit() and not _is_running(int(process)):
                left.unlink()


def _host() -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in socket.gethostname())


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # there, asking would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def reserve(file: BinaryIO, size: int) -> None:
    """Give a new file its size on the disk, so that a full disk is an error now and not in the midst of the work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        for start in range(0, size, 2**20):
            file.write(bytes(min(2**20, size - start)))


def check_room(path: Path, size: int, named: Path | None = None) -> None:
    """Find out before the work whether a file of some size can be written, by a trial that is removed.

    Args:
        path: The file.
        size: Bytes that it may take.
        named: What the error names; the file by default.

    Raises:
        OSError: If it cannot be written, with the reason.
    """
    trial = temporary_path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        with open(trial, "xb") as file:
            reserve(file, size)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise writing_error(named or path, error, size) from error
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)


def writing_error(path: Path, error: OSError, size: int) -> OSError:
    """The same error with the path and a reason that the user can act on; size: bytes that were to be written."""
    reasons = {
        errno.ENOSPC: f"the disk is full ({size / 1e6:.1f} MB are needed)",
        errno.EDQUOT: f"the disk quota is used up ({size / 1e6:.1f} MB are needed)",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "there is no permission to write in this folder",
        errno.EPERM: "there is no permission to write in this folder",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
        errno.EEXIST: "a part of the path is a file, not a folder",
        errno.EISDIR: "there is a folder of this name",
    }
    number = error.errno if error.errno is not None else errno.EIO
    reason = reasons.get(number, error.strerror or str(error))
    return OSError(number, f"Cannot write: {reason}; choose another path", str(path))


def with_suffix(path: str | os.PathLike[str]) -> Path:
    """The path with ``.safetensors`` at its end."""
    path = Path(path)
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def version() -> str:
    """The installed version of energyreg."""
    try:
        return importlib.metadata.version("energyreg")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's weights and buffers with their names, wherever they are."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    return digest(tensors, {})


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over tensors, with their names, dtypes and shapes, and over the metadata but for a checksum in it."""
    import torch

    digest = hashlib.sha256()
    digest.update(json.dumps({key: metadata[key] for key in sorted(metadata) if key != "sha256"}).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Any], kind: str, metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a safetensors file, with what it is, of which version, and a checksum.

    Args:
        path: File to write, with its suffix.
        tensors: Tensors by name, on any device; those that share memory are stored one by one.
        kind: What the file is: one of the formats above, or another.
        metadata: Strings by name.

    Raises:
        CheckpointError: If a value is no tensor.
        OSError: If the file cannot be written; an older one is intact.
    """
    import safetensors.torch
    from torch import Tensor

    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"Cannot save {str(path)!r}: {name!r} is a {type(tensor).__name__}, expected a tensor."
            )
        flat = tensor.detach().cpu().contiguous()
        storage = flat.untyped_storage()
        # safetensors refuses tensors that share memory (tied weights, views of a larger tensor).
        if storage.nbytes() != flat.nbytes or (flat.nbytes and storage.data_ptr() in storages):
            flat = flat.clone()
        storages.add(flat.untyped_storage().data_ptr())
        stored[name] = flat
    metadata = {"format": kind, "format_version": FORMAT_VERSION, "energyreg_version": version(), **metadata}
    metadata["sha256"] = digest(stored, metadata)
    content = safetensors.torch.save(stored, metadata)
    write_atomically(path, content)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`write_tensors` wrote: tensors on the CPU, and metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, of another kind, or of another format version.
    """
    import safetensors.torch

    content = _read_file(path)
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # SafetensorError, and for tensors of types that torch lacks KeyError
        raise CheckpointError(
            f"Cannot load {str(path)!r}: not a complete safetensors file ({error}). It is damaged, cut short, or of "
            "another kind; copy it again, or save the model again."
        ) from None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {})
    _check_format(path, metadata, kind)
    if digest(tensors, metadata) != metadata.get("sha256"):
        raise CheckpointError(
            f"Cannot load {str(path)!r}: its content does not match its checksum. It was damaged or changed after it "
            "was written; copy it again, or save the model again."
        )
    return tensors, metadata


def read_metadata(path: Path, kind: str) -> dict[str, str] | None:
    """The metadata of a file that :func:`write_tensors` wrote, after its checksum; without torch.

    Args:
        path: The file.
        kind: As in :func:`read_tensors`.

    Returns:
        Strings by name; None where something is wrong with the file, of which :func:`read_tensors` says what.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be read.
    """
    content = memoryview(_read_file(path))
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8:start]))
        metadata: dict[str, str] = header.pop("__metadata__")
        if metadata["format"] != kind or metadata["format_version"] != FORMAT_VERSION:
            return None
        found = hashlib.sha256()
        found.update(json.dumps({key: metadata[key] for key in sorted(metadata) if key != "sha256"}).encode())
        for name in sorted(header):
            low, high = header[name]["data_offsets"]
            found.update(json.dumps([name, TORCH_NAMES[header[name]["dtype"]], header[name]["shape"]]).encode())
            found.update(content[start + low : start + high])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return metadata if found.hexdigest() == metadata.get("sha256") else None


def _read_file(path: Path) -> bytes:
    """All bytes of a file, read once: a mapped file that shrinks while it is looked at ends the process."""

    def regular(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer would wait for one
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            os.close(descriptor)
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise CheckpointError(f"Cannot load {str(path)!r}: it is {what}; expected a file that save() wrote.")
        return descriptor

    try:
        with open(path, "rb", opener=regular) as file:
            return file.read()
    except FileNotFoundError:
        folder = " (a folder of that name without the suffix exists, but a model is one file)"
        hint = folder if path.with_suffix("").is_dir() else ""
        raise FileNotFoundError(errno.ENOENT, f"There is no such file{hint}", str(path)) from None
    except OSError as error:
        raise CheckpointError(f"Cannot load {str(path)!r}: {error.strerror or error}.") from error


def _check_format(path: Path, metadata: Mapping[str, str], kind: str) -> None:
    found = metadata.get("format")
    wanted = {ESTIMATOR: "an estimator", BOX_HEAD: "the head of a detector"}.get(kind, "a training state")
    hints = {
        TRAINING_STATE: "a training state: continue it by fit(..., checkpoint_dir=..., resume=True)",
        MODEL: f"a model, not {wanted}: read it by load()",
        ESTIMATOR: "an estimator: read it by EnergyRegressor.load()",
        BOX_HEAD: "the head of a detector: read it by energyreg.vision.load_head()",
    }
    if found in hints and found != kind:
        raise CheckpointError(f"Cannot load {str(path)!r}: it is {hints[found]}.")
    if found != kind:
        raise CheckpointError(f"Cannot load {str(path)!r}: a safetensors file, but none that energyreg wrote.")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"Cannot load {str(path)!r}: it has the format version {metadata.get('format_version')!r} (written by "
            f"energyreg {metadata.get('energyreg_version')}), but this energyreg ({version()}) reads version "
            f"{FORMAT_VERSION!r}. Update energyreg."
        )
