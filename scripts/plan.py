"""Print what a run costs before it starts: tokens, memory, disk, hours, and every request to SLURM.

    python scripts/plan.py --configfile mine.yaml

It reads only the config, and downloads and submits nothing. A plan that cannot fit is refused, with the
changes that would make it fit. docs/planning.md has the formulas.
"""

import argparse
import json
from pathlib import Path

from longyarn.cluster import plan_advice, plan_table, slurm_requests
from longyarn.core.errors import program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--configfile", type=Path, nargs="+", default=[], metavar="FILE",
        help="config files, later ones layered on earlier ones; default: config.yaml",
    )  # fmt: skip
    what.add_argument("--settings", type=json.loads, help="the whole configuration, as JSON")
    what.add_argument(
        "--document", action="store_true", help="print docs/requests.md: the default and presets/"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        default=slurm_requests.DEFAULT_PROFILE,
        help="Snakemake profile of the requests",
    )
    arguments = parser.parse_args()
    if arguments.document:
        print(slurm_requests.document(arguments.profile), end="")
        return
    config = arguments.settings or plan_table.planned(arguments.configfile)
    print(plan_table.costs(config), flush=True)
    plan_advice.check_fit(config)
    print(f"\nRequests to SLURM at the first attempt, by {arguments.profile}")
    try:
        print(
            "\n".join(
                f"  {rule}: {call}"
                for rule, call in slurm_requests.submissions(config, arguments.profile)
            )
        )
    except ModuleNotFoundError as error:
        print(f"  not shown: {error.name} is not installed; run `make setup-slurm`")


if __name__ == "__main__":
    program(main)()
