"""What the files that are written here have in common: they appear whole or not at all, and a checksum tells
whether they still are what was written.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

CHECKSUM = "sha256"
"""The key under which content holds the checksum of all else in it."""

IN_METADATA = f"efreg.{CHECKSUM}"
"""The same, in the metadata of a safetensors file."""


@contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO]:
    """A file that takes the place of `path` in one step, once wholly on disk; not if the block raises.

    Raises OSError, naming `path`, where it cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, mode, newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides it there
        if not isinstance(reason, OSError):
            raise
        raise OSError(
            f"cannot write {path} ({reason.strerror or reason}): free space there, or name a folder that can "
            "be written; what was there before is untouched"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its checksum."""
    return {**content, CHECKSUM: checksum(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `sealed`, or of before there were checksums.

    Raises ValueError where the checksum is of other content.
    """
    found = dict(content)
    told = found.pop(CHECKSUM, None)
    if told is not None and told != checksum(found):
        raise ValueError("its checksum is of other content")
    return found


def sealed_with(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a safetensors file of these tensors, with the checksum of both."""
    return {**metadata, IN_METADATA: _of_both(tensors, metadata)}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, whoever wrote it, and its metadata without a checksum.

    Raises ValueError where it is truncated or no such file, and where the checksum is of other content.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or foreign ({error}): save the model anew") from error
    told = metadata.pop(IN_METADATA, None)
    if told is not None and told != _of_both(tensors, metadata):
        raise ValueError(f"{path} is damaged, its checksum is of other content: save the model anew")
    return tensors, metadata


def _of_both(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A checksum that does not depend on the order, which safetensors has of its own."""
    return checksum([dict(sorted(part.items())) for part in (tensors, metadata)])


def checksum(content: Any) -> str:
    """SHA-256, in hexadecimal digits, of values nested in mappings, lists and tuples.

    A tensor counts by its dtype, its shape and its bytes, wherever it lies; anything else by its repr. Lists
    and tuples count alike, as JSON has it; the order of a mapping counts.
    """
    digest = hashlib.sha256()
    for part in _parts(content):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[Any]:
    """Bytes, and arrays of them, that are the same for the same value alone."""
    if isinstance(value, Mapping):
        yield b"{"
        for key, item in value.items():
            yield from (repr(key).encode(), b":", *_parts(item), b",")
        yield b"}"
    elif isinstance(value, (list, tuple)):
        yield b"["
        for item in value:
            yield from (*_parts(item), b",")
        yield b"]"
    elif isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    else:
        yield repr(value).encode()
