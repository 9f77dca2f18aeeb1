"""List the work directories of training, and delete those that no run needs any more.

    python scripts/clean_work.py --work work --delete

A directory is needed until its run is finished, and then as long as the run's manifest names it, because a
run with more steps resumes from its last checkpoint. A directory that a changed setting left behind is old.
Without --delete the program only lists.
"""

import argparse
import shutil
import time
from pathlib import Path

from longyarn.core import attempts, manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import read_json

QUIET = 3600  # seconds without a write after which no attempt can still be running


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("work"), help="config key paths.work")
    parser.add_argument("--delete", action="store_true", help="delete the old ones")
    arguments = parser.parse_args()
    if not arguments.work.is_dir():
        raise UserError(
            f"{arguments.work} is not a directory; give the value of config key paths.work as --work"
        )
    for directory in sorted(path for path in arguments.work.iterdir() if path.is_dir()):
        last = attempts.last_checkpoint(directory)
        files = [path for path in directory.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        steps = f"step {attempts.steps(last)}" if last else "no checkpoint"
        state = why_kept(directory) or "old"
        print(f"{directory}  {steps}  {size:.1f} MB  {state}")
        if state == "old" and arguments.delete:
            shutil.rmtree(directory)
            print(f"{directory}  deleted")


def why_kept(directory: Path) -> str | None:
    """Return why a work directory is kept, or None if it is old."""
    identity = directory / attempts.IDENTITY
    if not identity.is_file():
        return "not written by this version, kept"
    newest = max(path.stat().st_mtime for path in [directory, *directory.rglob("*")])
    if time.time() - newest < QUIET:
        return "written to within the last hour, kept"
    trained = Path(read_json(identity)["run"])
    if not trained.is_file():
        return f"{trained} is not written yet, kept"
    if manifest.read_facts(trained).get("work") == directory.name:
        return f"{trained} was made here, kept"
    return None


if __name__ == "__main__":
    program(main)()
