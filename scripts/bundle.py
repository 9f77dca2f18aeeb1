"""Put a sealed run and its workflow into one archive, to verify it and to evaluate it again elsewhere.

The corpus, the packed sequences and what was handed over to other frameworks stay behind: no evaluation
needs them, and they are often not the user's to pass on. The tokens go in, because perplexity needs them;
they hold the training text as token ids, so pass an archive on only if you may pass on that. The same run
gives the same bytes: names are sorted, and owners are left out.
"""

import argparse
import os
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from longyarn import stages
from longyarn.core import run_directory
from longyarn.core.console import progress
from longyarn.core.errors import UserError, program
from longyarn.core.files import require_space
from longyarn.provenance import checksums

OF_TAR = 2048  # bytes that a file takes beside its content, about


@dataclass(frozen=True)
class Member:
    """A file and its name in the archive; ``mtime`` in seconds where it is not the file's own."""

    name: str
    path: Path
    mtime: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seal", type=Path, required=True, help="SHA256SUMS of the run")
    parser.add_argument("--output", type=Path, required=True, help="archive to write")
    arguments = parser.parse_args()
    run = arguments.seal.parent
    check_place(run)
    members = list(members_of(run))
    sizes = {os.stat(one.path).st_ino: os.stat(one.path).st_size for one in members}
    require_space(
        arguments.output.parent, sum(sizes.values()) + OF_TAR * len(members), "the archive"
    )
    # An attempt that is taken for lost may still be writing the same file.
    partial = arguments.output.with_name(f"{arguments.output.name}.{os.getpid()}.partial")
    try:
        write(partial, members)
        os.replace(partial, arguments.output)
    finally:
        partial.unlink(missing_ok=True)
    print(
        f"bundle: {arguments.output} has {len(members)} files, none of "
        f"{', '.join(f'{name}/' for name in stages.NOT_BUNDLED)}; its tokens/ hold the training text as "
        "token ids, so pass it on only if you may",
        file=sys.stderr,
    )
    for setting in settings_of_elsewhere(yaml.safe_load((run / run_directory.CONFIG).read_bytes())):
        print(
            f"bundle: {setting} names what is not in the archive, so whoever gets it has to layer a file on "
            "config.yaml (docs/provenance.md)",
            file=sys.stderr,
        )


def check_place(run: Path) -> None:
    """Stop where a run lies outside the workflow's own directory, by its path."""
    if run.is_absolute() or ".." in run.parts:
        raise UserError(
            f"a bundle holds its run below the workflow's own directory, but paths.results leads out of it "
            f"({run}); set it to a relative path, which may be a link to another disk"
        )


def settings_of_elsewhere(config: dict) -> Iterator[str]:
    """Yield the settings without which Snakemake cannot start: they name files that no archive holds."""
    evaluation = config["evaluation"]
    if evaluation["passkey"]["haystack"]:
        yield "evaluation.passkey.haystack"
    for name in evaluation["variants"]:
        if "run" in evaluation["more_variants"].get(name, {}):
            yield f"evaluation.more_variants.{name}.run"


def members_of(run: Path) -> Iterator[Member]:
    """Yield what goes into the archive: the workflow, then what is sealed of the run."""
    names = [*checksums.read(run), run_directory.SEAL]
    made = run_directory.manifests(run, names)
    kept = [name for name in names if not is_left_out(name)]
    for name in kept:
        if not (run / name).is_file():
            raise UserError(
                f"{run / name} is sealed but missing, and an archive needs it; {mend(run, name, made)}"
            )
    directories = sorted({str(PurePosixPath(name).parent) for name in kept})
    times = [str(PurePosixPath(directory) / run_directory.TIMESTAMP) for directory in directories]
    kept += [name for name in times if (run / name).is_file()]
    top = PurePosixPath(f"longyarn-{run.name}")
    # Some of these files are inputs of stages, so none may be newer than what was made from them.
    oldest = int(min((run / name).stat().st_mtime for name in made))
    for name in sorted(kept):
        if name.startswith(f"{run_directory.WORKFLOW}/") and not name.endswith(
            run_directory.TIMESTAMP
        ):
            yield Member(
                str(top / name.removeprefix(f"{run_directory.WORKFLOW}/")), run / name, oldest
            )
    for name in sorted(kept):
        yield Member(str(top / run.as_posix() / name), run / name)


def mend(run: Path, name: str, made: dict[str, dict]) -> str:
    """Return what to do about a sealed file that is missing."""
    directories = {
        one for file in made for one in run_directory.payload_directories(file, made[file])
    }
    above = [str(parent) for parent in PurePosixPath(name).parents]
    holder = next((directory for directory in above if directory in directories), None)
    # Alone, because with --forcerun all would run that follows its stage, training too.
    alone = f", or bring it alone with `snakemake -- {run / holder}`" if holder else ""
    return f"restore it{alone}, then seal again with `snakemake --forcerun provenance`"


def is_left_out(name: str) -> bool:
    """Tell whether a file is of a payload that stays behind, the run's own or that of a phase or cell."""
    path = PurePosixPath(name)
    return path.parts[0] != run_directory.WORKFLOW and any(
        above.name in stages.NOT_BUNDLED and above.parent.name not in stages.VARIANT_DIRECTORIES
        for above in path.parents
    )


def write(path: Path, members: list[Member]) -> None:
    """Write an archive; a file that has several names is in it once, and linked."""
    first: dict[tuple[int, int], str] = {}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        sizes = {one.name: one.path.stat().st_size for one in members}
        for one in progress(
            members, sum(sizes.values()), "bundle, bytes", size=lambda one: sizes[one.name]
        ):
            with open(one.path, "rb") as file:
                status = os.fstat(file.fileno())
                entry = tarfile.TarInfo(one.name)
                entry.mtime = int(status.st_mtime) if one.mtime is None else one.mtime
                entry.mode = 0o755 if status.st_mode & 0o100 else 0o644
                inode = (status.st_dev, status.st_ino)
                # Not the workflow's copies: who edits one of them would edit what is sealed.
                if one.mtime is None and status.st_nlink > 1 and inode in first:
                    entry.type, entry.linkname = tarfile.LNKTYPE, first[inode]
                    archive.addfile(entry)
                    continue
                if one.mtime is None:
                    first[inode] = one.name
                entry.size = status.st_size
                archive.addfile(entry, file)


if __name__ == "__main__":
    program(main)()
