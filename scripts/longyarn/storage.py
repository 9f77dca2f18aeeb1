"""safetensors files larger than memory: written a part at a time, read in place.

The library writes only what is in memory whole. The format is a length in 8 bytes, a header of JSON and
then the tensors end to end (https://github.com/huggingface/safetensors).
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longyarn.cli import UserError

NAMES = {
    "bool": "BOOL", "uint8": "U8", "uint16": "U16", "int32": "I32", "int64": "I64", "uint64": "U64",
}  # fmt: skip
DTYPES = {name: np.dtype(dtype) for dtype, name in NAMES.items()}
ALIGNMENT = 8


@dataclass(frozen=True)
class Stream:
    """A tensor of this type and shape whose rows come in ``parts``, in order."""

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Iterable[np.ndarray]


def write(path: Path, tensors: Mapping[str, np.ndarray | Stream]) -> None:
    """Write a safetensors file, atomically, with no more of a ``Stream`` in memory than one part.

    Tensors with wide numbers come first, so that each is aligned. Equal input gives equal bytes.
    """
    streams = {name: _as_stream(tensor) for name, tensor in tensors.items()}
    ordered = sorted(streams.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, end = {}, 0
    for name, stream in ordered:
        begin, end = end, end + stream.dtype.itemsize * int(np.prod(stream.shape))
        header[name] = {
            "dtype": NAMES[stream.dtype.name],
            "shape": list(stream.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    path = Path(path)
    # An attempt that is taken for lost may still be writing the same file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in (part for _, stream in ordered for part in stream.parts):
            file.write(np.ascontiguousarray(part).data)
        if file.tell() != 8 + len(text) + end:
            raise ValueError(f"the tensors of {path} do not have the shapes that were stated")
    os.replace(partial, path)


def _as_stream(tensor: np.ndarray | Stream) -> Stream:
    if isinstance(tensor, Stream):
        return tensor
    # An empty array has no buffer to write.
    return Stream(tensor.dtype, tensor.shape, [tensor] if tensor.size else [])


def read(path: Path) -> dict[str, np.ndarray]:
    """Return a file's tensors, memory-mapped: what is not looked at is not read."""
    places = header(path)
    return {
        name: np.memmap(path, dtype=place.dtype, mode="r", offset=place.begin, shape=place.shape)
        if np.prod(place.shape)
        else np.empty(place.shape, place.dtype)
        for name, place in places.items()
    }


def load(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Return these tensors of a file, in memory; the file is not kept open."""
    places = header(path)
    found = {}
    with open(path, "rb") as file:
        for name in names:
            place = places[name]
            file.seek(place.begin)
            found[name] = np.fromfile(file, place.dtype, int(np.prod(place.shape)))
            found[name] = found[name].reshape(place.shape)
    return found


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file: from byte ``begin``."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int


def header(path: Path) -> dict[str, Place]:
    """Return where a file's tensors lie; raise ``UserError`` for a broken file."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(size))
        return {
            name: Place(
                DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
            )
            for name, entry in found.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        raise UserError(f"{path} is no safetensors file; delete it and run again") from None
