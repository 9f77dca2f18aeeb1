"""The gate of a run: its figures against the thresholds of config section `gate`.

A figure passes on its value; where its interval reaches across the threshold, that is said. A run that
misses a threshold ends with exit code 1 and one sentence. Nothing is deleted: a mark stands beside the
model until the gate passes.
"""

import argparse
import json
import sys
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import read_json, write_text
from longyarn.reporting.gate_outcome import compare, missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, required=True, help="report.json of the run")
    parser.add_argument("--merge", type=Path, required=True, help="manifest of the merged model")
    parser.add_argument(
        "--thresholds", type=json.loads, required=True, help="config section `gate`, as JSON"
    )
    parser.add_argument("--mark", type=Path, required=True, help="file that marks a failed run")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    arguments = parser.parse_args()
    thresholds = arguments.thresholds

    verdict = read_json(arguments.report)["verdict"]
    merged = manifest.read_facts(arguments.merge)
    compared = compare(thresholds, verdict, merged["merge_error"], merged["merge_error_tensor"])
    if said := missed(compared):
        write_text(arguments.mark, f"{said}.\n")
        raise UserError(
            f"this run is not verified, because {said}; {arguments.mark} marks it, and its files are "
            "kept, with the report; train longer or on more, or loosen the threshold"
        )
    arguments.mark.unlink(missing_ok=True)
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings=thresholds,
        inputs={"merge": arguments.merge},
        files=[],
        facts={"compared": compared},
    )
    print(in_words(compared), file=sys.stderr)


def in_words(compared: list[dict]) -> str:
    """Return what a run that passed is told."""
    if not compared:
        return "gate: config section gate sets no threshold, so nothing is asked of this run"
    close = [one["threshold"] for one in compared if not one["decided"]]
    also = (
        f"; {' and '.join(close)} on the value alone, because no interval decides" if close else ""
    )
    return f"gate: {len(compared)} threshold{'s' * (len(compared) > 1)} met{also}"


if __name__ == "__main__":
    program(main)()
