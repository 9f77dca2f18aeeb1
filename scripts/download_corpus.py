"""Collect the documents of all sources of the corpus as JSON Lines in shards.

    python scripts/download_corpus.py --packages '[…]' --files '[…]' --datasets '[…]' \
        --cache .cache --manifest results/micro/corpus.json --output results/micro/corpus

The three lists are those of the config section `corpus`, as JSON, with every key of their entries.
Sources are Python packages of books, which are pinned by SHA-256 and read as data; local files; and data
sets of the Hugging Face hub, streamed up to a budget. longyarn/data/documents.py describes the shards.
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("packages", "files", "datasets"):
        parser.add_argument(
            f"--{name}", type=json.loads, default=[], help=f"config list `corpus.{name}`, as JSON"
        )
    parser.add_argument("--skip-bad", action="store_true", help="count bad records and go on")
    parser.add_argument("--cache", type=Path, required=True, help="directory of downloads")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()
    # Caches of the hub's libraries. HF_HOME is not set, because it also moves the login.
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
            f"{name}: {found.documents} documents, {found.characters} characters; left out: "
            f"{found.empty_documents} empty, {found.bad_records} bad"
        )


def check(arguments: argparse.Namespace) -> None:
    """Raise ``UserError`` for mistakes that show before anything is downloaded."""
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
    """Raise ``UserError`` if a collection has no documents."""
    for name, found in collections.found.items():
        if not found.documents:
            raise UserError(
                f"collection {name} has no documents ({found.empty_documents} empty, "
                f"{found.bad_records} bad); correct its entry in corpus, or remove it"
            )


if __name__ == "__main__":
    program(main)()
