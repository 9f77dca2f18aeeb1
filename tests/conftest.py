"""What the suites share: the scripts' modules on the path, a copy of the repository to run in."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from containers.images import cpu_image  # noqa: E402, F401, a fixture
from hub.server import Hub  # noqa: E402
from slurm.cluster import Cluster, unavailable  # noqa: E402

# What a run reads; a copy of these is a working directory of its own.
PARTS = (
    "Snakefile",
    "config.yaml",
    "rules",
    "scripts",
    "schemas",
    "resources",
    "profiles",
    "tests",
    "containers",
    "envs",
)


# So long that with several processes they must not come last.
LONGEST = ("test_containers", "test_slurm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest suites first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


class Workspace:
    """A copy of the repository in which Snakemake runs, sharing the cache of downloads."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for part in PARTS:
            if (ROOT / part).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / part, directory / part, ignore=ignored)
            else:
                shutil.copy(ROOT / part, directory / part)
        (directory / ".cache").symlink_to(ROOT / ".cache", target_is_directory=True)

    def snakemake(
        self,
        *arguments: str,
        overrides: dict | None = None,
        check: bool = True,
        before: tuple[str, ...] = (),
    ):
        """Run Snakemake with the test configuration and, layered on it, ``overrides``.

        ``before`` is put in front of the command, to run it under another program.
        """
        files = ["config.yaml", "tests/config.yaml"]
        if overrides:
            (self.directory / "overrides.yaml").write_text(json.dumps(overrides))
            files.append("overrides.yaml")
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", *files, "--"]
        command[3:3] = [a for a in arguments if a.startswith("-")]
        command += [a for a in arguments if not a.startswith("-")]
        return self.run([*before, *command], check=check)

    def run(self, command: list, check: bool = True):
        """Run a command here, with the environment's programs first on the path."""
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if check and done.returncode:
            pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}")
        return done

    def planned(self, overrides: dict | None = None, *arguments: str) -> dict[str, int]:
        """Return which rules a dry run would run, and how many jobs of each, without `all`."""
        text = self.snakemake("-n", *arguments, overrides=overrides).stdout
        jobs = Counter(re.findall(r"^(?:local)?rule (\w+):$", text, re.M))
        assert jobs or "Nothing to be done" in text, text
        jobs.pop("all", None)
        return dict(jobs)


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """A copy of the repository, nothing run."""
    (ROOT / ".cache").mkdir(exist_ok=True)
    return Workspace(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Workspace:
    """A copy of the repository in which the test configuration ran to the end; do not change it."""
    (ROOT / ".cache").mkdir(exist_ok=True)
    workspace = Workspace(tmp_path_factory.mktemp("finished"))
    workspace.snakemake()
    return workspace


@pytest.fixture
def hub():
    """A Hugging Face hub on this machine, with nothing in it yet."""
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A real SLURM of two nodes on this machine; skips with the reason where it cannot be had."""
    if reason := unavailable():
        pytest.skip(f"no SLURM cluster: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def finished_copy(finished, tmp_path) -> Workspace:
    """A copy of the finished run that a test may change; times and Snakemake's records are kept."""
    shutil.copytree(finished.directory, tmp_path / "copy", symlinks=True)
    workspace = object.__new__(Workspace)
    workspace.directory = tmp_path / "copy"
    return workspace
