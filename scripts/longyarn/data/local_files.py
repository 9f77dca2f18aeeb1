"""Reading documents from local files: text, Markdown, JSON Lines, Parquet and Arrow, also compressed.

A text or Markdown file is one document. In the other formats each record is one, and the files are read
in parts, never whole.
"""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from longyarn.core.errors import UserError, first_line
from longyarn.core.files import sha256
from longyarn.data.columns import BadRecord, clean, columns, to_document
from longyarn.data.documents import Collection

FORMATS = {
    ".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow",
    ".feather": "arrow",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ROWS = 64  # read at once from a Parquet or Arrow file; a row can be a book


def read(entry: dict, collection: Collection) -> Iterator[dict]:
    """Yield the documents of an entry of corpus.files, in the order of the files' paths."""
    root = fixed_part(entry["files"])
    for path in matches(entry["files"]):
        relative = path.relative_to(root)
        name = document_name(relative)
        for number, (place, record) in enumerate(records(path, entry)):
            where = f" {place}" if place else ""
            try:
                if isinstance(record, BadRecord):
                    raise record
                yield to_document(record, entry, f"{name}/{number}" if place else name)
            except BadRecord as error:
                collection.bad(f"{path}{where}", error, f"{relative.as_posix()}{where}")


def matches(pattern: str) -> list[Path]:
    """Return the files that match a pattern, sorted; ``**`` matches directories of any depth."""
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    return sorted(path for path in map(Path, found) if path.is_file())


def check(entry: dict) -> None:
    """Raise ``UserError`` if a pattern matches no file, or if a file's format is unknown."""
    found = matches(entry["files"])
    if not found:
        raise UserError(
            f"corpus.files finds no file that matches {entry['files']!r}; correct the pattern"
        )
    for path in found:
        format_of(path, entry)


def fixed_part(pattern: str) -> Path:
    """Return the directory that contains all files of a pattern: the part before its first wildcard."""
    directories = Path(os.path.expanduser(pattern)).parts[:-1]
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), directories))


def pattern_below(pattern: str) -> str:
    """Return a pattern without its fixed part, so that it names no directory of this machine."""
    return Path(os.path.expanduser(pattern)).relative_to(fixed_part(pattern)).as_posix()


def fingerprint(entry: dict) -> dict:
    """Return an entry with its pattern below the fixed part, and a digest of file names and contents.

    It names no directory of this machine, so equal files give equal manifests in any place.
    """
    root, found = fixed_part(entry["files"]), matches(entry["files"])
    digest = hashlib.sha256()
    for path in found:
        digest.update(f"{path.relative_to(root).as_posix()}\0{sha256(path)}\n".encode())
    pattern = pattern_below(entry["files"])
    return entry | {"files": pattern, "found": len(found), "sha256": digest.hexdigest()}


def document_name(path: Path) -> str:
    """Return a file's name for the id of its document: lower case, without suffixes."""
    name = path.name
    for suffix in (*COMPRESSIONS, *FORMATS):
        name = name.removesuffix(suffix)
    parts = [*path.parent.parts, name]
    return "/".join(re.sub(r"\W+", "_", part.lower()).strip("_") or part for part in parts)


def format_of(path: Path, entry: dict) -> str:
    """Return the format of a file: the one in the entry, or the one that its name implies."""
    if entry["format"]:
        return entry["format"]
    suffix = Path(path.stem if path.suffix in COMPRESSIONS else path.name).suffix
    if suffix not in FORMATS:
        raise UserError(
            f"the name of {path} does not tell its format; set format in corpus.files (text, "
            "markdown, jsonl, parquet or arrow), or exclude the file"
        )
    return FORMATS[suffix]


def records(path: Path, entry: dict) -> Iterator[tuple[str, object]]:
    """Yield each record's place in a file, and the record or a ``BadRecord`` that says what is wrong."""
    kind = format_of(path, entry)
    try:
        if kind == "jsonl":
            yield from lines(path, entry)
        elif kind in ("parquet", "arrow"):
            yield from rows(path, entry, kind)
        else:
            yield "", whole_text(path, entry, kind)
    except OSError as error:
        if error.errno is not None:  # an error of the file system, not of the format
            raise
        raise UserError(
            f"{path} is damaged or not a {path.suffix.lstrip('.')} file ({first_line(error)}); restore it"
        ) from None


def whole_text(path: Path, entry: dict, kind: str) -> object:
    """Return the record of a file that is one document, or a ``BadRecord`` if it cannot be decoded."""
    with opened(path) as file:
        content = file.read()
    try:
        text = content.decode(entry["encoding"])
    except UnicodeDecodeError as error:
        return BadRecord(f"is not {entry['encoding']} ({first_line(error)})")
    text = text.removeprefix("\ufeff")
    if kind == "markdown":
        # Remove the block of metadata that many tools put first.
        text = re.sub(r"\A---[ \t]*\r?\n.*?^---[ \t]*\r?$", "", text, flags=re.S | re.M)
    # The record has one column, with the name that the entry expects.
    return {entry["column"]: clean(text)}


def lines(path: Path, entry: dict) -> Iterator[tuple[str, object]]:
    """Yield the records of a JSON Lines file; blank lines are ignored."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", parsed(line, entry["encoding"])


def parsed(line: bytes, encoding: str) -> object:
    """Return a line's record, or a ``BadRecord`` if it cannot be decoded."""
    try:
        return json.loads(line.decode(encoding).removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return BadRecord(f"is not {encoding} ({first_line(error)})")
    # A number with too many digits raises a plain ValueError.
    except (ValueError, RecursionError) as error:
        return BadRecord(f"is not JSON ({first_line(error)})")


def rows(path: Path, entry: dict, kind: str) -> Iterator[tuple[str, object]]:
    """Yield the records of a Parquet or Arrow file, with only the columns that are needed."""
    import pyarrow
    from pyarrow import ipc, parquet

    with seekable(path) as file:
        try:
            if kind == "parquet":
                source = parquet.ParquetFile(file)
                wanted = present(path, entry, source.schema_arrow.names)
                batches = source.iter_batches(batch_size=ROWS, columns=wanted)
            else:
                source = arrow_reader(ipc, file)
                wanted = present(path, entry, source.schema.names)
                batches = (
                    batch.select(wanted).slice(start, ROWS)
                    for batch in arrow_batches(source)
                    for start in range(0, len(batch), ROWS)
                )
            number = 0
            for batch in batches:
                for record in unpacked(batch):
                    yield f"record {number}", record
                    number += 1
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
            raise UserError(
                f"{path} is damaged or not a {kind.capitalize()} file ({first_line(error)}); restore it"
            ) from None


def arrow_reader(ipc, file: BinaryIO):
    """Open an Arrow file or an Arrow stream."""
    import pyarrow

    try:
        return ipc.open_file(file)
    except pyarrow.ArrowInvalid:
        file.seek(0)
        return ipc.open_stream(file)


def arrow_batches(source) -> Iterator:
    """Yield the record batches of an Arrow file or stream."""
    if hasattr(source, "num_record_batches"):
        yield from (source.get_batch(number) for number in range(source.num_record_batches))
    else:
        yield from source


def present(path: Path, entry: dict, names: list[str]) -> list[str]:
    """Return the top-level columns to read; a name with a dot is a key inside a column."""
    wanted = []
    for column in columns(entry):
        top = column if column in names else column.partition(".")[0]
        if top not in names:
            raise UserError(
                f"{path} has no column {column!r}; it has {', '.join(map(repr, names))}; correct the "
                "column in corpus.files"
            )
        wanted.append(top)
    return list(dict.fromkeys(wanted))


def unpacked(batch) -> list:
    """Return the records of a batch, with a ``BadRecord`` for text that is not UTF-8.

    Parquet files can hold such text, because nothing checks it when it is written.
    """
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [BadRecord("is not utf-8")]
        return [record for row in range(len(batch)) for record in unpacked(batch.slice(row, 1))]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for sequential reading, decompressed if its name says that it is compressed."""
    import pyarrow

    if path.suffix not in COMPRESSIONS:
        with open(path, "rb") as file:
            yield file
        return
    if not path.stat().st_size:
        raise UserError(
            f"{path} is empty, so it is not a {path.suffix.lstrip('.')} file; restore it"
        )
    # pyarrow notices a truncated file. Python's zstd readers do not.
    with pyarrow.input_stream(str(path), compression=COMPRESSIONS[path.suffix]) as stream:
        yield io.BufferedReader(stream)


@contextlib.contextmanager
def seekable(path: Path) -> Iterator[BinaryIO]:
    """Open a file for random access; a compressed file is first unpacked to a temporary file."""
    with opened(path) as file:
        if path.suffix not in COMPRESSIONS:
            yield file
            return
        with tempfile.TemporaryFile() as unpacked_file:
            shutil.copyfileobj(file, unpacked_file)
            unpacked_file.seek(0)
            yield unpacked_file
