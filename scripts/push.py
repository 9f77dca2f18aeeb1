"""Push the exported model to the Hugging Face hub in one commit, and compare the files there with ours.

    python scripts/push.py --export results/micro/export.json --gate results/micro/verified.json \
        --repository owner/name --manifest results/micro/push.json

The repository is created if it is missing. The token is the one that huggingface_hub finds: HF_TOKEN, or
that of `hf auth login`. Only a run that passed the gate is pushed.
"""

import argparse
import sys
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.errors import UserError, program
from longyarn.models import hub_upload
from longyarn.models.hub_errors import hub_errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--export", type=Path, required=True, help="manifest of the exported model")
    parser.add_argument("--gate", type=Path, required=True, help="manifest of the gate")
    parser.add_argument("--repository", required=True, help="owner/name on the hub, empty for none")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    arguments = parser.parse_args()
    hub_upload.check_destination(arguments.repository)
    exported, gate = manifest.read(arguments.export), manifest.read(arguments.gate)
    if gate["inputs"]["merge"] != exported["inputs"]["merge"]:
        raise UserError(
            f"{arguments.gate} belongs to another merged model than {arguments.export}; run `snakemake` first"
        )
    directory = arguments.export.parent / exported["facts"]["directory"]
    with hub_errors(arguments.repository, "export.repository", write=True):
        commit = hub_upload.upload(
            arguments.repository, arguments.private, directory, exported["files"]
        )
        hub_upload.check(arguments.repository, commit, directory, exported["files"])
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings={"repository": arguments.repository, "private": arguments.private},
        inputs={"export": arguments.export, "gate": arguments.gate},
        files=[],
        facts={"repository": arguments.repository, "commit": commit},
    )
    print(f"push: {arguments.repository} is at the commit {commit}", file=sys.stderr)


if __name__ == "__main__":
    program(main)()
