"""Seal a run: write its full configuration, a copy of the workflow, the record of all jobs, and SHA256SUMS.

    python scripts/provenance.py --seal results/micro/SHA256SUMS --settings '{"run": "micro", …}'

--settings is the full configuration as JSON (`snakemake -p` prints it). Every file of the run is hashed and
compared with the manifests before anything is written: a run that does not match is not sealed. The
configuration, the workflow and the record are not outputs of the rule, because Snakemake deletes the outputs
of a job that failed. docs/provenance.md says what the files are for.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path, PurePosixPath

import yaml

from longyarn.config import sweep_cells
from longyarn.core import manifest, run_directory, superseded
from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory, read_json, sha256, write_json, write_text
from longyarn.provenance import checksums, ro_crate

# What a run needs, and what a person needs to understand it; those that exist are copied.
PARTS = (
    "Snakefile", "config.yaml", "Makefile", "README.md", "README.zh.md", "LICENSE", "CITATION.cff",
    "rules", "scripts", "schemas", "resources", "profiles", "presets", "containers", "envs",
)  # fmt: skip
WRITTEN = (
    run_directory.CONFIG,
    run_directory.CRATE,
    run_directory.PROVENANCE,
    run_directory.OWN_RECORD,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seal", type=Path, required=True, help="the run's SHA256SUMS, to write")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="the full configuration, as JSON"
    )
    parser.add_argument(
        "--images", type=Path, nargs="*", default=[], help="container images that are files"
    )
    arguments = parser.parse_args()
    run = arguments.seal.parent

    names = run_directory.to_seal(run_directory.everything(run))
    names = [name for name in names if name not in WRITTEN and not is_workflow(name)]
    manifests = run_directory.manifests(run, names)
    hashes = checksums.hashes(run, names, "hash, bytes")
    check(run, hashes, manifests)
    report = read_json(run / run_directory.REPORT)
    for name in superseded.outdated(manifests, hashes, report):
        print(f"provenance: {superseded.said(run, name)}", file=sys.stderr)

    # From here on the run is not sealed, until the last line seals it.
    arguments.seal.unlink(missing_ok=True)
    with new_directory(run / run_directory.WORKFLOW) as directory:
        copy_workflow(Path(__file__).resolve().parents[1], directory)
    text = yaml.safe_dump(arguments.settings, sort_keys=False, allow_unicode=True)
    write_text(run / run_directory.CONFIG, text)

    workflow = [
        name for name in run_directory.to_seal(run_directory.everything(run)) if is_workflow(name)
    ]
    hashes |= checksums.hashes(run, [run_directory.CONFIG, *workflow], "hash, bytes")
    images = {image.name: sha256(image) for image in arguments.images if image.is_file()}
    write_json(run / run_directory.CRATE, ro_crate.build(run, hashes, manifests, images))
    for note in run_directory.other_code(manifests, run / run_directory.WORKFLOW):
        print(f"provenance: {note}", file=sys.stderr)
    manifest.write(
        run / run_directory.PROVENANCE,
        script=Path(__file__),
        settings={},
        inputs={name: run / name for name in manifests},
        files=[run / name for name in (run_directory.CONFIG, run_directory.CRATE, *workflow)],
        facts={"files": len(hashes), "manifests": len(manifests)},
    )
    own = [run_directory.CRATE, run_directory.PROVENANCE, run_directory.OWN_RECORD]
    own = [name for name in own if (run / name).is_file()]
    hashes |= checksums.hashes(run, own, "hash, bytes")
    # Last, because this file seals the run.
    write_text(arguments.seal, checksums.render(hashes))
    print(f"provenance: {len(hashes)} files are sealed in {arguments.seal}", file=sys.stderr)


def copy_workflow(root: Path, directory: Path) -> None:
    """Copy the workflow below ``root``, without caches; modification times are kept."""
    for part in PARTS:
        if (root / part).is_dir():
            hidden = shutil.ignore_patterns("__pycache__", ".*", "*.partial")
            shutil.copytree(root / part, directory / part, ignore=hidden)
        elif (root / part).is_file():
            shutil.copy2(root / part, directory / part)


def is_workflow(name: str) -> bool:
    """Tell whether a file belongs to the copy of the workflow."""
    return name.startswith(f"{run_directory.WORKFLOW}/")


def check(run: Path, hashes: dict[str, str], manifests: dict[str, dict]) -> None:
    """Refuse a file that differs from its manifest: it changed after its stage wrote it."""
    for name, one in manifests.items():
        for file, entry in run_directory.payload(name, one).items():
            if file in hashes and hashes[file] != entry["sha256"]:
                raise UserError(
                    f"{run / file} is not what {one['stage']} wrote, by {run / name}; {remedy(run, name)}"
                )


def remedy(run: Path, name: str) -> str:
    """Return what to do about a manifest whose payload changed."""
    top = PurePosixPath(name).parts[0]
    if top.startswith("step-"):
        return f"delete {run / top}, which no stage needs, and run again"
    if top == sweep_cells.DIRECTORY:
        return f"delete {run / name} and run `snakemake sweep`, so that both are made again"
    return f"delete {run / name} and run again, so that both are made again"


if __name__ == "__main__":
    program(main)()
