"""The archive of a sealed run and its workflow: which files it holds, and the tar file itself.

The same run gives the same bytes: names are sorted, and owners are left out.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from longyarn import stages
from longyarn.core import run_directory
from longyarn.core.console import progress
from longyarn.core.errors import UserError
from longyarn.core.files import require_space
from longyarn.provenance import checksums

BYTES_PER_MEMBER = 2048  # that tar needs besides the content, approximately


@dataclass(frozen=True)
class Member:
    """A file and its name in the archive; ``mtime`` in seconds if it is not the file's own."""

    name: str
    path: Path
    mtime: int | None = None


def check_place(run: Path) -> None:
    """Refuse a run whose path leads out of the working directory."""
    if run.is_absolute() or ".." in run.parts:
        raise UserError(
            "an archive stores the run at its path below the working directory, but paths.results leads out "
            f"of it ({run}); set it to a relative path, which may be a link to another disk"
        )


def settings_of_elsewhere(config: dict) -> Iterator[str]:
    """Yield the settings that name files which no archive holds; Snakemake cannot start without them."""
    evaluation = config["evaluation"]
    if evaluation["passkey"]["haystack"]:
        yield "evaluation.passkey.haystack"
    for name in evaluation["variants"]:
        if "run" in evaluation["more_variants"].get(name, {}):
            yield f"evaluation.more_variants.{name}.run"


def members_of(run: Path) -> Iterator[Member]:
    """Yield the files of the archive: the workflow, then the sealed files of the run."""
    names = [*checksums.read(run), run_directory.SEAL]
    made = run_directory.manifests(run, names)
    kept = [name for name in names if not is_left_out(name)]
    for name in kept:
        if not (run / name).is_file():
            raise UserError(
                f"{run / name} is sealed but missing, and the archive needs it; {remedy(run, name, made)}"
            )
    directories = sorted({str(PurePosixPath(name).parent) for name in kept})
    times = [str(PurePosixPath(directory) / run_directory.TIMESTAMP) for directory in directories]
    kept += [name for name in times if (run / name).is_file()]
    top = PurePosixPath(f"longyarn-{run.name}")
    # Some files of the workflow are inputs of stages: none may be newer than what was made from it.
    oldest = int(min((run / name).stat().st_mtime for name in made))
    inside = f"{run_directory.WORKFLOW}/"
    for name in sorted(kept):
        if name.startswith(inside) and not name.endswith(run_directory.TIMESTAMP):
            yield Member(str(top / name.removeprefix(inside)), run / name, oldest)
    for name in sorted(kept):
        yield Member(str(top / run.as_posix() / name), run / name)


def remedy(run: Path, name: str, made: dict[str, dict]) -> str:
    """Return what to do about a sealed file that is missing."""
    directories = {
        one for file in made for one in run_directory.payload_directories(file, made[file])
    }
    above = [str(parent) for parent in PurePosixPath(name).parents]
    holder = next((directory for directory in above if directory in directories), None)
    # Its own target, because --forcerun would also run every later stage, training included.
    alone = f", or make it again with `snakemake -- {run / holder}`" if holder else ""
    return f"restore it{alone}, then seal the run again with `snakemake --forcerun provenance`"


def is_left_out(name: str) -> bool:
    """Tell whether a file is training data of the run, of a phase or of a cell."""
    path = PurePosixPath(name)
    return path.parts[0] != run_directory.WORKFLOW and any(
        above.name in stages.NOT_BUNDLED and above.parent.name not in stages.VARIANT_DIRECTORIES
        for above in path.parents
    )


def write(output: Path, members: list[Member]) -> None:
    """Write the archive, atomically; refuse a disk that cannot hold it."""
    sizes = {os.stat(one.path).st_ino: os.stat(one.path).st_size for one in members}
    needed = sum(sizes.values()) + BYTES_PER_MEMBER * len(members)
    require_space(output.parent, needed, "the archive")
    # The process id, because an earlier attempt that counts as lost may still be writing.
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    try:
        write_tar(partial, members)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def write_tar(path: Path, members: list[Member]) -> None:
    """Write a tar file; a file with several names is stored once, and its other names are links."""
    first: dict[tuple[int, int], str] = {}
    sizes = {one.name: one.path.stat().st_size for one in members}
    total = sum(sizes.values())
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for one in progress(members, total, "bundle, bytes", size=lambda one: sizes[one.name]):
            with open(one.path, "rb") as file:
                status = os.fstat(file.fileno())
                entry = tarfile.TarInfo(one.name)
                entry.mtime = int(status.st_mtime) if one.mtime is None else one.mtime
                entry.mode = 0o755 if status.st_mode & 0o100 else 0o644
                inode = (status.st_dev, status.st_ino)
                # The workflow's files are copies: to edit one must not change a sealed file.
                if one.mtime is None and status.st_nlink > 1 and inode in first:
                    entry.type, entry.linkname = tarfile.LNKTYPE, first[inode]
                    archive.addfile(entry)
                    continue
                if one.mtime is None:
                    first[inode] = one.name
                entry.size = status.st_size
                archive.addfile(entry, file)
