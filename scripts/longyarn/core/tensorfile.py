"""safetensors files that are larger than memory: written part by part, read in place.

The library can write only tensors that are in memory. The format is a length in 8 bytes, a JSON header,
and then the tensors, one after the other (https://github.com/huggingface/safetensors).
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longyarn.core.errors import UserError

DTYPES = {
    "BOOL": np.dtype("bool"), "U8": np.dtype("uint8"), "U16": np.dtype("uint16"),
    "I32": np.dtype("int32"), "I64": np.dtype("int64"), "U64": np.dtype("uint64"),
}  # fmt: skip
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
WIDTHS = {kind: dtype.itemsize for kind, dtype in DTYPES.items()}
# Types of model weights, some of which NumPy lacks.
WIDTHS |= {
    "I8": 1, "I16": 2, "U32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8,
}  # fmt: skip
TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
ALIGNMENT = 8
BLOCK = 1 << 24  # bytes
ELEMENTS = 1 << 22  # in memory at once


@dataclass(frozen=True)
class Stream:
    """A tensor to write: its type in the format's own words, its shape, and its bytes in order, in parts."""

    kind: str
    shape: tuple[int, ...]
    parts: Iterable[np.ndarray]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file: ``size`` bytes that start at byte ``begin``."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def dtype(self) -> np.dtype:
        """The NumPy type; KeyError if NumPy has none."""
        return DTYPES[self.kind]


Tensors = dict[str, tuple[Path, Place]]  # by name: the file and the place in it


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray | Stream],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically, with at most one part of a ``Stream`` in memory.

    Tensors with the widest numbers come first, so that each is aligned. Equal input gives equal bytes.
    """
    streams = {name: _as_stream(tensor) for name, tensor in tensors.items()}
    ordered = sorted(streams.items(), key=lambda item: (-WIDTHS[item[1].kind], item[0]))
    header, end = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name, stream in ordered:
        begin, end = end, end + WIDTHS[stream.kind] * math.prod(stream.shape)
        header[name] = {
            "dtype": stream.kind,
            "shape": list(stream.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    path = Path(path)
    # Another attempt at this job may still be alive and write the same file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for part in (part for _, stream in ordered for part in stream.parts):
                file.write(np.ascontiguousarray(part).data)
            if file.tell() != 8 + len(text) + end:
                raise ValueError(f"the tensors of {path} do not have the stated shapes")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _as_stream(tensor: np.ndarray | Stream) -> Stream:
    if isinstance(tensor, Stream):
        return tensor
    # An empty array has no buffer to write.
    return Stream(KINDS[tensor.dtype], tensor.shape, [tensor] if tensor.size else [])


def read(path: Path) -> dict[str, np.ndarray]:
    """Return a file's tensors, memory-mapped: only what is used is read."""
    places = header(path)
    return {
        name: np.memmap(path, dtype=place.dtype, mode="r", offset=place.begin, shape=place.shape)
        if place.size
        else np.empty(place.shape, place.dtype)
        for name, place in places.items()
    }


def load(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Return the named tensors of a file, read into memory. The file is closed again."""
    places = header(path)
    found = {}
    with open(path, "rb") as file:
        for name in names:
            place = places[name]
            file.seek(place.begin)
            found[name] = np.fromfile(file, place.dtype, int(np.prod(place.shape)))
            found[name] = found[name].reshape(place.shape)
    return found


def blocks(path: Path, place: Place) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor, block by block."""
    with open(path, "rb") as file:
        file.seek(place.begin)
        left = place.size
        while left:
            yield np.fromfile(file, np.uint8, min(left, BLOCK))
            left -= min(left, BLOCK)


def torch_rows(path: Path, place: Place, begin: int = 0, count: int | None = None):
    """Return a tensor of a file as a torch tensor, or ``count`` of its rows from row ``begin`` on."""
    import torch

    rows, *rest = place.shape or (1,)
    count = rows - begin if count is None else count
    width = math.prod(rest) * WIDTHS[place.kind]
    content = bytearray(count * width)
    with open(path, "rb", buffering=0) as file:
        file.seek(place.begin + begin * width)
        # The system returns more than 2 GiB in several pieces.
        view = memoryview(content)
        while view and (got := file.readinto(view)):
            view = view[got:]
    found = torch.frombuffer(content, dtype=getattr(torch, TORCH[place.kind]))
    return found.reshape((count, *rest) if place.shape else ())


def row_blocks(path: Path, place: Place) -> Iterator[tuple[int, object]]:
    """Yield ``(number of the first row, rows)`` of a tensor as torch's, some rows at a time."""
    count, *rest = place.shape or (1,)
    step = max(1, ELEMENTS // max(1, math.prod(rest)))
    for begin in range(0, count, step):
        yield begin, torch_rows(path, place, begin, min(step, count - begin))


def header(path: Path) -> dict[str, Place]:
    """Return where each tensor of a file lies. Raises ``UserError`` if the file is broken."""
    return _header(path)[0]


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file."""
    return _header(path)[1]


def tensors(files: Iterable[Path]) -> Tensors:
    """Return where each tensor of several files is."""
    return {name: (file, place) for file in files for name, place in header(file).items()}


def _header(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(size))
            whole = os.fstat(file.fileno()).st_size
        about = found.pop("__metadata__", {})
        places = {}
        for name, entry in found.items():
            if entry["dtype"] not in WIDTHS:
                raise UserError(
                    f"{path} has {name} of type {entry['dtype']}, which Longyarn does not know; choose a "
                    "model whose weights are not quantised"
                )
            begin, end = entry["data_offsets"]
            place = Place(entry["dtype"], tuple(entry["shape"]), 8 + size + begin, end - begin)
            if place.size != WIDTHS[place.kind] * math.prod(place.shape) or 8 + size + end > whole:
                raise ValueError(name)
            places[name] = place
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        raise UserError(
            f"{path} is not a complete safetensors file; restore it, or delete it and run again"
        ) from None
    return places, about
