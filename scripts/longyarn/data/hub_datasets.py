"""Reading documents from data sets of the Hugging Face hub, streamed up to a budget and resumable.

Downloads are kept in a directory of the cache, named by a hash of the settings that define them. It has
shards as in a corpus, and ``position.json``, which is written after each shard and says where to continue.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from gzip import BadGzipFile
from pathlib import Path

from longyarn.core.console import progress
from longyarn.core.errors import UserError, first_line
from longyarn.core.files import read_json, write_json
from longyarn.data import documents
from longyarn.data.columns import BadRecord, characters, is_empty, to_document, value_at
from longyarn.data.documents import Collection
from longyarn.models.hub_errors import hub_errors, unreachable

KEY = "corpus.datasets"  # in error messages

# Raise it when a change of the code makes the same settings give other documents.
VERSION = 1
ALL_BAD = 100  # if this many records are bad from the first on, the entry itself is wrong

START = {
    "shards": 0, "sizes": [], "finished": False, "stream": None, "records_read": 0, "characters_read": 0,
    "characters": 0, "empty_documents": 0, "bad_records": 0, "bad_examples": [], "ended_by": None,
}  # fmt: skip
COUNTS = ("records_read", "empty_documents", "bad_records", "bad_examples", "ended_by")


def read(entry: dict, collection: Collection, cache: Path) -> Iterator[dict]:
    """Yield the documents of an entry of corpus.datasets, downloading what the cache lacks."""
    from huggingface_hub.utils import WeakFileLock

    check(entry)
    directory = cache / key(entry, collection.skip_bad)
    directory.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(directory / "lock"):  # runs share the cache
        position = fetch(entry, collection, directory)
    for name in COUNTS:
        setattr(collection, name, position[name])
    for number in range(position["shards"]):
        yield from documents.read_shard(directory / documents.shard_name(number))


def check(entry: dict) -> None:
    """Raise ``UserError`` for a data set without a revision, or with files of an unsupported format."""
    builder_of(entry)
    if entry["revision"] is None:
        raise UserError(
            f"corpus.datasets has no revision of {entry['repository']}; set the commit that you reviewed: "
            f"`git ls-remote https://huggingface.co/datasets/{entry['repository']} main`"
        )


def check_access(entry: dict) -> None:
    """Raise ``UserError`` if the hub lacks a data set at its revision, or denies access to it."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    name, revision = entry["repository"], entry["revision"]
    with hub_errors(name, KEY, revision, dataset=True):
        files = HfApi().dataset_info(name, revision=revision, timeout=10).siblings
        if files:
            # Anyone can read the record of a gated data set. Whether we have access shows at a file.
            place = {"repo_type": "dataset", "revision": revision}
            get_hf_file_metadata(hf_hub_url(name, files[0].rfilename, **place), timeout=10)


def is_fetched(entry: dict, skip_bad: bool, cache: Path) -> bool:
    """Tell whether the cache has all documents of an entry."""
    return last_position(cache / key(entry, skip_bad))["finished"]


def last_position(directory: Path) -> dict:
    """Return how far an entry was downloaded: nothing, if a shard is missing or has another size."""
    file = directory / "position.json"
    position = read_json(file) if file.is_file() else START
    shards = [directory / documents.shard_name(number) for number in range(position["shards"])]
    sizes = [shard.stat().st_size if shard.is_file() else None for shard in shards]
    return dict(position if sizes == position["sizes"] else START)


def key(entry: dict, skip_bad: bool) -> str:
    """Return the name of the directory for an entry's documents."""
    defining = {name: value for name, value in entry.items() if name != "licence"}
    text = json.dumps([VERSION, defining, skip_bad], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fetch(entry: dict, collection: Collection, directory: Path) -> dict:
    """Download an entry's missing documents into a directory; return the last position."""
    file, position = directory / "position.json", last_position(directory)
    if position["finished"]:
        return position
    collection.bad_records = position["bad_records"]
    collection.bad_examples = list(position["bad_examples"])
    check_access(entry)
    with loading_errors(entry):
        stream = open_stream(entry)
        if position["stream"]:
            print(f"{entry['collection']}: continues after shard {position['shards']}", flush=True)
            stream.load_state_dict(position["stream"])
        found = progress(
            chosen(entry, stream, position, collection),
            entry["characters"],
            f"{entry['collection']}: characters",
            done=position["characters"],
            size=characters,
        )
        while documents.write_shard(
            shard := directory / documents.shard_name(position["shards"]), found
        ):
            position |= {
                "shards": position["shards"] + 1,
                "sizes": [*position["sizes"], shard.stat().st_size],
                "stream": stream.state_dict(),
                "bad_records": collection.bad_records,
                "bad_examples": collection.bad_examples,
            }
            write_json(file, position)
    position |= {
        "finished": True, "stream": None, "bad_records": collection.bad_records,
        "bad_examples": collection.bad_examples,
    }  # fmt: skip
    write_json(file, position)
    return position


def open_stream(entry: dict):
    """Return the data set as an ``IterableDataset``, which downloads only what is read."""
    from datasets import load_dataset

    at = f"hf://datasets/{entry['repository']}"
    if entry["data_files"] is None:
        return load_dataset(
            at, entry["config"], split=entry["split"], revision=entry["revision"], streaming=True
        )
    # Naming the files keeps a loading script in the repository from running.
    files = [f"{at}@{entry['revision']}/{pattern}" for pattern in entry["data_files"]]
    return load_dataset(builder_of(entry), data_files=files, split="train", streaming=True)


def builder_of(entry: dict) -> str:
    """Return the reader of an entry's data_files, by their names. Without data_files any reader will do."""
    for ending, builder in (("parquet", "parquet"), ("arrow", "arrow"), ("json", "json")):
        if all(f".{ending}" in pattern for pattern in entry["data_files"] or []):
            return builder
    raise UserError(
        f"corpus.datasets has data_files {entry['data_files']} of {entry['repository']}; name files of "
        "one format: Parquet, Arrow or JSON Lines"
    )


def chosen(entry: dict, stream, position: dict, collection: Collection) -> Iterator[dict]:
    """Yield the documents of an entry up to its budget, and update the counts in ``position``."""
    budget, limit = entry["characters"], entry["read_at_most"]
    for record in stream:
        number = position["records_read"]
        position["records_read"] += 1
        try:
            document = to_document(record, entry, str(number))
            wanted = matches(record, entry["filter"])
        except BadRecord as error:
            collection.bad(f"{entry['repository']} record {number}", error)
            if collection.bad_records == position["records_read"] == ALL_BAD:
                raise UserError(
                    f"the first {ALL_BAD} records of {entry['repository']} are all bad: record {number} "
                    f"{error}; correct its entry in corpus.datasets"
                ) from None
            continue
        size = characters(document)
        position["characters_read"] += size
        if is_empty(document):
            position["empty_documents"] += 1
        elif wanted and size >= (entry["min_characters"] or 0):
            position["characters"] += size
            yield document
        if budget is not None and position["characters"] >= budget:
            position["ended_by"] = "characters"
            return
        if limit is not None and position["characters_read"] >= limit:
            position["ended_by"] = "read_at_most"
            return
    position["ended_by"] = "end"


def matches(record: dict, wanted: dict) -> bool:
    """Tell whether a record has all values of a filter."""
    return all(value_at(record, path) == value for path, value in wanted.items())


@contextlib.contextmanager
def loading_errors(entry: dict) -> Iterator[None]:
    """Turn errors of the hub and of the library into ``UserError``."""
    from datasets import exceptions
    from httpx2 import HTTPError
    from pyarrow import ArrowException
    from zstandard import ZstdError

    damaged = (exceptions.DatasetsError, ArrowException, ZstdError, EOFError, BadGzipFile)
    name = entry["repository"]
    try:
        yield
    except exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{name} cannot be downloaded from the hub ({first_line(error)}); correct corpus.datasets, or "
            "accept its terms on its page and log in with `hf auth login`"
        ) from None
    except damaged as error:
        raise UserError(
            f"{name} cannot be read ({first_line(error.__cause__ or error)}); correct its entry in "
            "corpus.datasets, or name undamaged files under data_files"
        ) from None
    except FileNotFoundError as error:
        raise UserError(
            f"{name} lacks a file that corpus.datasets names ({first_line(error)}); correct its data_files"
        ) from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{name} needs a loading script, which Longyarn does not run; name its Parquet or JSONL files "
            "under data_files in corpus.datasets"
        ) from None
    except (HTTPError, ConnectionError) as error:
        raise unreachable(f"the data set {name}", KEY, error) from None
    except ValueError as error:
        raise UserError(
            f"{name} cannot be read as configured ({first_line(error)}); correct config, split or "
            "data_files in corpus.datasets"
        ) from None
