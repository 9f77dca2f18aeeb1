"""Verify a sealed run: is it still what it was when it was sealed?

    python scripts/verify.py results/micro

Every file is hashed and compared with SHA256SUMS, the crate and its manifest. Manifests are followed to those
that they were made from, and the report's figures are computed again. For each mismatch there is one
sentence, and the exit code is 1. docs/provenance.md says what that proves. Neither torch nor a network is
needed.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from longyarn.core import manifest, run_directory, superseded
from longyarn.core.code_hash import code_hash
from longyarn.core.errors import UserError, program
from longyarn.core.files import sha256
from longyarn.provenance.verification import Run
from longyarn.reporting.assemble import assemble
from longyarn.stages import GATE, REPORT, TRAIN

CHECKOUT = Path(__file__).resolve().parents[1]
REPORT_SCRIPT = Path(__file__).with_name("report.py")
GATED = f"{GATE.manifest}.json"
# Sections of the configuration, and the manifest that records with which of their keys a stage ran.
SECTIONS = {"training": f"{TRAIN.manifest}.json", "gate": GATED}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="the run's directory: results/micro")
    path = parser.parse_args().run
    if path is None:
        raise UserError("no run is named; use `make verify RUN=results/micro`")
    run_directory.require(path)
    run = Run(path)
    found = findings(run)
    for note in notes(run):
        print(f"note: {note}", file=sys.stderr)
    for finding in found:
        print(f"error: {finding}", file=sys.stderr)
    if found:
        sys.exit(1)
    print(
        f"{path} is whole: {len(run.sums)} files and {len(run.manifests)} manifests are as they were sealed; "
        f"the SHA-256 of {run_directory.SEAL}, to compare with the one that you wrote down elsewhere, is "
        f"{sha256(path / run_directory.SEAL)}"
    )


def findings(run: Run) -> list[str]:
    """Return one sentence for each mismatch."""
    # Figures computed from changed files would say nothing.
    return list(run.findings()) or [*of_figures(run), *of_config(run)]


def of_figures(run: Run) -> Iterator[str]:
    """Compute report.json again from the manifests and compare all of it but the timings."""
    if why_not_computed(run):
        return
    said = run.json(run_directory.REPORT)
    jobs = superseded.reported(run.manifests, said)
    made = assemble(
        {job: run.manifests[name] for job, name in jobs.items()},
        {job: run.real[name] for job, name in jobs.items()},
        said["rope"]["trained"],
        run.manifests[GATED]["settings"],
        code_hash(REPORT_SCRIPT),
    )
    made["model"]["disclosure"] = said["model"]["disclosure"]
    made["timings"] = said["timings"]
    made = json.loads(json.dumps(made))
    for key in sorted(said.keys() | made.keys()):
        if not same(said.get(key), made.get(key)):
            yield f"{run.said(run_directory.REPORT)} has other {key!r} than the manifests give"


def why_not_computed(run: Run) -> str | None:
    """Return why the report cannot be computed again here, or None."""
    said = run.json(run_directory.REPORT)
    if said["code"][REPORT.name] != code_hash(REPORT_SCRIPT):
        return "the report's code is different here"
    if not all(superseded.reported(run.manifests, said).values()):
        return "a variant is the model of another run"
    return None


def of_config(run: Run) -> Iterator[str]:
    """Compare the configuration with the settings that stages ran with."""
    config = yaml.safe_load((run.path / run_directory.CONFIG).read_bytes())
    for section, name in SECTIONS.items():
        ran, now = run.manifests[name]["settings"], manifest.portable(config[section])
        if any(key not in now or now[key] != value for key, value in ran.items()):
            stage = run.makers.stage(name)
            yield f"{run.said(run_directory.CONFIG)} has another {section!r} than {stage} ran with, by {name}"


def notes(run: Run) -> Iterator[str]:
    """Yield one sentence for each fact that is no error but worth knowing."""
    for directory in sorted(run.purged):
        yield f"{run.path / directory}/ is not here, so not checked; a finished run does without it"
    later = (
        {*run_directory.to_seal(run.names)}
        - run.records.keys()
        - {name for name, _ in run.strays()}
    )
    if later:
        yield (
            f"not sealed, because they came later: {len(later)} of the files here, for example {min(later)}; "
            "`snakemake --forcerun provenance` seals them"
        )
    if (run.path / run_directory.MARK).is_file():
        yield f"{run.path / run_directory.MARK} says that this run misses a threshold"
    for name in run.outdated():
        yield superseded.said(run.path, name)
    for sentence in run_directory.other_code(run.manifests, CHECKOUT):
        yield f"{sentence}, in this checkout"
    try:
        why = why_not_computed(run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # ``findings`` says what is wrong
    if why:
        yield f"the figures of the report are not computed again, because {why}"


def same(one: object, other: object) -> bool:
    """Tell whether two values are equal; numbers may differ by the rounding of another machine."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return one == other


if __name__ == "__main__":
    program(main)()
