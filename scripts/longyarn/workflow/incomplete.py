"""Results whose payload is not complete: Snakemake must not take them for done.

Snakemake sees that a directory is missing, but not that a file is missing inside one, and scratch file
systems delete single files. Without its manifest a stage counts as not done, and Snakemake runs it again
where its result is needed.
"""

import os
from pathlib import Path

from longyarn.core.errors import UserError
from longyarn.core.files import read_json
from longyarn.core.manifest import problems
from longyarn.core.run_directory import WORKFLOW


def incomplete(run: Path) -> dict[Path, str]:
    """Return the manifests of a run whose payload is not complete, each with a sentence that says why."""
    found = {}
    copy = Path(run) / WORKFLOW  # of the workflow itself, which holds no results
    for path in sorted(Path(run).rglob("*.json")):
        if path.is_relative_to(copy) or not path.with_suffix("").is_dir():
            continue
        try:
            broken = problems(path, read_json(path))
        except (UserError, KeyError, TypeError, AttributeError) as error:
            broken = [f"{path} is not a manifest ({error})"]
        if broken:
            found[path] = broken[0]
    return found


def set_aside(manifests: list[Path]) -> None:
    """Rename manifests to <name>.incomplete."""
    for path in manifests:
        os.replace(path, path.with_name(f"{path.name}.incomplete"))


def hide(manifests: list[Path]) -> None:
    """Make the plan of a dry run as if these manifests did not exist; nothing is renamed.

    Snakemake offers no way to say that a file is not to count, so its test of existence is replaced, for
    the rest of this process.
    """
    from snakemake.io import _IOFile

    hidden, exists = {str(path) for path in manifests}, _IOFile.exists_local

    async def exists_local(file) -> bool:
        return str(file) not in hidden and await exists(file)

    if hidden:
        _IOFile.exists_local = exists_local
