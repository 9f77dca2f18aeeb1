"""Seal a run: its whole configuration, a copy of the workflow, the record of all jobs, and SHA256SUMS.

Every file of the run is hashed, and compared with the manifests before anything is written: what does not
match is not sealed. docs/provenance.md says what the files are for.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import yaml

from longyarn import crate, manifest, runs, seal
from longyarn.cli import UserError, program

# What a run reads, and what a person needs to know of it; those that are there.
PARTS = (
    "Snakefile", "config.yaml", "Makefile", "README.md", "README.zh.md", "LICENSE", "CITATION.cff",
    "rules", "scripts", "schemas", "resources", "profiles", "presets", "containers", "envs",
)  # fmt: skip
WRITTEN = (runs.CONFIG, runs.CRATE, runs.PROVENANCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seal", type=Path, required=True, help="the run's SHA256SUMS, to write")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="the whole configuration, as JSON"
    )
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="images that are a file")
    arguments = parser.parse_args()
    run = arguments.seal.parent

    for path in (*(run / name for name in WRITTEN), arguments.seal):
        path.unlink(missing_ok=True)
    with manifest.new_directory(run / runs.WORKFLOW) as directory:
        copy_workflow(Path(__file__).resolve().parents[1], directory)
    text = yaml.safe_dump(arguments.settings, sort_keys=False, allow_unicode=True)
    manifest.write_text(run / runs.CONFIG, text)

    names = [name for name in runs.to_seal(runs.everything(run)) if name != runs.OWN_RECORD]
    manifests = runs.manifests(run, names)
    hashes = seal.hashes(run, names, "hash, bytes")
    check(hashes, manifests)
    images = {image.name: manifest.sha256(image) for image in arguments.images if image.is_file()}
    manifest.write_json(run / runs.CRATE, crate.build(run, hashes, manifests, images))
    for note in runs.other_code(manifests, run / runs.WORKFLOW):
        print(f"provenance: {note}", file=sys.stderr)
    workflow = [name for name in names if name.startswith(f"{runs.WORKFLOW}/")]
    manifest.write(
        run / runs.PROVENANCE,
        script=Path(__file__),
        settings={},
        inputs={name: run / name for name in manifests},
        files=[run / name for name in (runs.CONFIG, runs.CRATE, *workflow)],
        facts={"files": len(names), "manifests": len(manifests)},
    )
    own = [runs.CRATE, runs.PROVENANCE, runs.OWN_RECORD]
    own = [name for name in own if (run / name).is_file()]
    hashes |= seal.hashes(run, own, "hash, bytes")
    # Last: with it the run is sealed.
    manifest.write_text(arguments.seal, seal.render(hashes))
    print(f"provenance: {len(hashes)} files are sealed in {arguments.seal}", file=sys.stderr)


def copy_workflow(root: Path, directory: Path) -> None:
    """Copy what the run was made with, without caches; times are kept."""
    for part in PARTS:
        if (root / part).is_dir():
            hidden = shutil.ignore_patterns("__pycache__", ".*", "*.partial")
            shutil.copytree(root / part, directory / part, ignore=hidden)
        elif (root / part).is_file():
            shutil.copy2(root / part, directory / part)


def check(hashes: dict[str, str], manifests: dict[str, dict]) -> None:
    """Stop where a file is not what its manifest lists: it changed since its stage wrote it."""
    for name, one in manifests.items():
        for file, entry in runs.payload(name, one).items():
            if file in hashes and hashes[file] != entry["sha256"]:
                raise UserError(
                    f"{file} is not what {one['stage']} wrote, by {name}; delete {name} and run again, so "
                    "that both are made anew"
                )


if __name__ == "__main__":
    program(main)()
