"""Where and when a job ran: a record beside its manifest, in environments/.

Manifests hold no time and no hardware, so that two equal runs have equal manifests. This record holds both,
but neither the host nor the user. It is not an output of a rule, so nothing runs again because of it.
"""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from longyarn.core.errors import disk_is_full, first_line
from longyarn.core.files import write_json

DIRECTORY = "environments"
COMMIT, IMAGE = "LONGYARN_COMMIT", "LONGYARN_IMAGE"  # rules/common.smk sets both
PREFIXES = ("APPTAINER", "SINGULARITY")  # one program under two names


def path_of(manifest: Path) -> Path:
    """Return the path of the record that belongs to a manifest."""
    return Path(manifest).parent / DIRECTORY / Path(manifest).name


def record() -> dict:
    """Return what is known about this process and its machine; unknown values are None.

    ``start`` and ``end`` are ISO 8601 in UTC, ``memory`` is in bytes, ``commit`` is the workflow's.
    """
    import psutil

    commit, dirty = os.environ.get(COMMIT, ""), None
    if commit:
        commit, _, changed = commit.partition("-")
        dirty = bool(changed)
    return {
        "start": in_utc(psutil.Process().create_time()),
        "end": in_utc(datetime.now(UTC).timestamp()),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "gpus": gpus(),
        "system": system(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": commit or None,
        "dirty": dirty,
        "image": os.environ.get(IMAGE) or None,
    }


def in_utc(seconds: float) -> str:
    """Write seconds since 1970 as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def cpu() -> str | None:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or None)


def gpus() -> list[str]:
    """Return the names of the GPUs that torch sees; an empty list if the job did not use torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def system() -> str:
    """Return the operating system and its version; inside an image, those of the image."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def variables(root: Path, image: str | None) -> dict[str, str]:
    """Return the environment variables that tell jobs the workflow's commit and their image.

    ``root`` is the repository; ``image`` is what Snakemake runs jobs in. Of an image file only the name is
    kept, which holds the hash of what the image was built from. The variables with a prefix reach
    containers that do not inherit the host's environment.
    """
    values = {COMMIT: commit_of(root) or ""}
    values[IMAGE] = (image if "://" in image else Path(image).name) if image else ""
    inside = {f"{prefix}ENV_{key}": value for prefix in PREFIXES for key, value in values.items()}
    return values | (inside if image else {})


def commit_of(root: Path) -> str | None:
    """Return the commit of the repository at ``root``, followed by -dirty if files differ.

    None without git, or if ``root`` lies inside the repository of something else.
    """
    if not (root / ".git").exists():
        return None
    git = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*git, *describe], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def write_environment(path: Path) -> None:
    """Write where and when this process ran beside its result ``path``, a manifest or the report.

    If the record cannot be made, a line says so and the stage goes on; a full disk is an error.
    """
    written = path_of(path)
    try:
        write_json(written, record())
    except Exception as error:
        if disk_is_full(error):
            raise
        print(f"{written} is not written ({first_line(error)})", file=sys.stderr)
