"""Compare a run's figures with the thresholds of config section `gate`.

    python scripts/gate.py --report results/micro/report.json --merge results/micro/merged.json \\
        --thresholds '{"perplexity_ratio": 1, "passkey_rate": 0.9, "merge_error": 0.5}' \\
        --mark results/micro/NOT_VERIFIED.txt --manifest results/micro/verified.json

A figure passes if its value does; a message says if its interval includes the threshold. If a threshold is
missed, the program ends with one sentence and exit code 1. Nothing is deleted: the file NOT_VERIFIED.txt
marks the run until the gate passes.
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
            f"this run is not verified, because {said}; its files and its report are kept, and "
            f"{arguments.mark} marks it; train longer or on more data, or loosen the threshold"
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
    """Return the message for a run that passed."""
    if not compared:
        return "gate: config section gate sets no threshold, so nothing was compared"
    close = [one["threshold"] for one in compared if not one["decided"]]
    also = (
        f"; {' and '.join(close)} only by its value, because its interval does not decide"
        if close
        else ""
    )
    return f"gate: {len(compared)} threshold{'s' * (len(compared) > 1)} met{also}"


if __name__ == "__main__":
    program(main)()
