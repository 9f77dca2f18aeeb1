"""Put a sealed run and its workflow into one archive, to verify and evaluate the run elsewhere.

    python scripts/bundle.py --seal results/micro/SHA256SUMS --output results/micro.tar

The corpus, the packed sequences and the exports to other frameworks are left out: no evaluation needs them,
and you often may not pass them on. The tokens are included, because perplexity needs them. They hold the
training text as token ids, so pass an archive on only if you may pass on that text.
"""

import argparse
import sys
from pathlib import Path

import yaml

from longyarn import stages
from longyarn.core import run_directory
from longyarn.core.errors import program
from longyarn.provenance import archive


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seal", type=Path, required=True, help="SHA256SUMS of the run")
    parser.add_argument("--output", type=Path, required=True, help="archive to write")
    arguments = parser.parse_args()
    run = arguments.seal.parent
    archive.check_place(run)
    members = list(archive.members_of(run))
    archive.write(arguments.output, members)
    print(
        f"bundle: {arguments.output} has {len(members)} files, without "
        f"{', '.join(f'{name}/' for name in stages.NOT_BUNDLED)}; its tokens/ hold the training text as "
        "token ids, so pass it on only if you may pass on that text",
        file=sys.stderr,
    )
    config = yaml.safe_load((run / run_directory.CONFIG).read_bytes())
    for setting in archive.settings_of_elsewhere(config):
        print(
            f"bundle: {setting} names something that is not in the archive, so the recipient has to override "
            "it with a second configuration file (docs/provenance.md)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    program(main)()
