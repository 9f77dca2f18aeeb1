"""Bring the corpus: documents of all its sources, as JSON Lines in shards.

Packages of books are fetched by name, version and SHA-256 and read as data. The form of the shards is
described in longyarn/documents.py.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from longyarn import documents, manifest, packages
from longyarn.cli import UserError, program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--packages", type=json.loads, required=True, help="config list `corpus.packages`, as JSON"
    )
    parser.add_argument("--cache", type=Path, required=True, help="directory of archives")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()

    collections = documents.Collections()
    with manifest.new_directory(arguments.output) as directory:
        shards = documents.write_shards(directory, collections.keep(read(arguments, collections)))
        if not shards:
            raise UserError(
                "the corpus is empty: none of its documents has text; mend corpus.packages"
            )
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings={"packages": arguments.packages},
        inputs={},
        files=[arguments.output / shard.name for shard in shards],
        facts=collections.facts(),
    )


def read(arguments: argparse.Namespace, collections: documents.Collections) -> Iterator[dict]:
    """Yield the documents of all sources, in the order of the config."""
    for package in arguments.packages:
        source = f"package {package['name']} {package['version']}"
        for rule in package["documents"]:
            collections.open(rule["collection"], source)
        yield from packages.read(package, arguments.cache / "packages")


if __name__ == "__main__":
    program(main)()
