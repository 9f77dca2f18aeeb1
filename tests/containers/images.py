"""The CPU image for the tests: built for real by containers/build.py, in a registry on loopback.

Nothing of Docker Hub can be had in a test, so the base is a Debian 12 made by mmdebstrap, pinned by its
digest as any base is. Base and image stay in .cache/tests/containers/, so that only a fresh machine,
or a changed recipe, pays for them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from longyarn.cluster import container_images

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "tests" / "containers"
TOOLS = ("podman", "runc", "skopeo", "umoci", "bwrap", "mmdebstrap", "docker-registry")

# What python:3.11-slim has and a minimal Debian lacks; g++ is what containers/install would add.
BASE = [
    "mmdebstrap", "--quiet", "--variant=minbase", "--skip=output/dev",
    "--include=python3,python3-venv,python3-dev,g++,ca-certificates",
    "--dpkgopt=force-unsafe-io", "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
    "bookworm", "-",
]  # fmt: skip

# podman as root on a machine without systemd, or inside another container.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=30000:30000"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
STORAGE_CONF = """
[storage]
driver = "overlay"
graphroot = "{directory}/storage"
runroot = "{directory}/run"
"""
REGISTRIES_CONF = """
unqualified-search-registries = []
[[registry]]
location = "{registry}"
insecure = true
"""
REGISTRY_CONF = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {directory}/registry}}}}
http: {{addr: {registry}}}
"""


@dataclass
class Image:
    """The CPU image in a registry on loopback, and what a process needs to use it.

    ``address`` is docker://127.0.0.1:PORT/longyarn-cpu@sha256:…; ``base`` is the base image's. ``record``
    is the text that containers/build.py wrote into containers/images.yaml. ``environment`` are the
    variables for Snakemake: first on PATH is an `apptainer`, the real one where it is installed, else
    the stand-in.
    """

    address: str
    base: str
    record: str
    environment: dict[str, str]


def unavailable() -> str | None:
    """Return why no image can be built and run here, or nothing."""
    if os.geteuid() != 0:
        return "building and running images in the tests needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (tests/containers/install does it)"
    return None


@pytest.fixture(scope="session")
def cpu_image(tmp_path_factory) -> Iterator[Image]:
    """The built CPU image (an `Image`); skips with the reason where it cannot be built or run.

    To run a workflow in it, put ``cpu_image.environment`` into the environment of Snakemake (and of
    what submits its jobs), write ``cpu_image.record`` into the copy's containers/images.yaml, or set
    container.image to ``cpu_image.address``, and give `--sdm apptainer`. It runs inside SLURM's jobs
    too. The registry is there until the session ends.
    """
    reason = unavailable()
    if reason:
        pytest.skip(f"no container: {reason}")
    CACHE.mkdir(parents=True, exist_ok=True)
    directory = tmp_path_factory.mktemp("containers")
    with registry_on_loopback(directory) as registry:
        environment = {
            "CONTAINERS_CONF": write(directory / "containers.conf", CONTAINERS_CONF),
            "CONTAINERS_REGISTRIES_CONF": write(
                directory / "registries.conf", REGISTRIES_CONF.format(registry=registry)
            ),
            "APPTAINER_CACHEDIR": str(CACHE / "apptainer"),
            "APPTAINER_NOHTTPS": "1",
        }
        if shutil.which("apptainer") is None:
            environment["PATH"] = f"{HERE / 'bin'}{os.pathsep}{os.environ['PATH']}"
        with open(CACHE / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several sessions share the cache
            base, record = built(registry, os.environ | environment)
        address = yaml.safe_load(record)["cpu"]["image"]
        yield Image(address, f"docker://{base}", record, environment)


@contextlib.contextmanager
def registry_on_loopback(directory: Path) -> Iterator[str]:
    """Run a registry over the cache; yield its host and port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        registry = f"127.0.0.1:{probe.getsockname()[1]}"
    config = write(
        directory / "registry.yaml", REGISTRY_CONF.format(directory=CACHE, registry=registry)
    )
    with open(directory / "registry.log", "w") as log:
        process = subprocess.Popen(["docker-registry", "serve", config], stdout=log, stderr=log)
    try:
        host, port = registry.split(":")
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
                break
            time.sleep(0.1)
        assert process.poll() is None, (directory / "registry.log").read_text()[-2000:]
        yield registry
    finally:
        process.terminate()
        process.wait()


def built(registry: str, environment: dict[str, str]) -> tuple[str, str]:
    """Return the base's name@digest and the record of the image, building what the cache lacks."""
    known_path = CACHE / "known.json"
    known = json.loads(known_path.read_text()) if known_path.exists() else {}
    with storage_of_podman() as storage:
        environment = environment | {"CONTAINERS_STORAGE_CONF": storage}
        key = hashlib.sha256(repr(BASE).encode()).hexdigest()[:12]
        if key not in known:
            known[key] = make_base(f"{registry}/base", environment)
            known_path.write_text(json.dumps(known))
        base = f"{registry}/base@{known[key]}"
        builder = (ROOT / "containers" / "build.py").read_bytes()
        key += (
            container_images.recipe("cpu", "Dockerfile", ROOT)
            + hashlib.sha256(builder).hexdigest()[:12]
        )
        if key not in known:
            known[key] = build(registry, base, environment).replace(registry, "REGISTRY")
            known_path.write_text(json.dumps(known))
    return base, known[key].replace("REGISTRY", registry)


@contextlib.contextmanager
def storage_of_podman() -> Iterator[str]:
    """Yield the configuration of an empty storage for podman, which is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        directory = Path(name)
        try:
            yield write(directory / "storage.conf", STORAGE_CONF.format(directory=directory))
        finally:  # podman leaves this mounted
            subprocess.run(
                ["umount", "--lazy", directory / "storage" / "overlay"], stderr=subprocess.DEVNULL
            )


def make_base(name: str, environment: dict[str, str]) -> str:
    """Make a minimal Debian with Python, push it, and return its digest."""
    with subprocess.Popen(BASE, stdout=subprocess.PIPE) as debian:
        run(["podman", "import", "--quiet", "-", name], environment, stdin=debian.stdout)
    with tempfile.NamedTemporaryFile("r") as file:
        run(["podman", "push", "--quiet", "--digestfile", file.name, name], environment)
        return file.read().strip()


def build(registry: str, base: str, environment: dict[str, str]) -> str:
    """Build and push the CPU image from a copy of the repository; return the images.yaml written."""
    with tempfile.TemporaryDirectory() as directory:
        for part in ("containers", "envs", "scripts"):
            shutil.copytree(ROOT / part, Path(directory) / part)
        command = [sys.executable, "containers/build.py", "push", "--image", "cpu"]
        command += ["--registry", registry, "--base", base]
        run(command, environment, cwd=directory)
        return (Path(directory) / "containers" / "images.yaml").read_text(encoding="utf-8")


def run(command: list, environment: dict[str, str], **options) -> None:
    """Run a command; a failure fails the test with all that the command said."""
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}")


def write(path: Path, text: str) -> str:
    """Write a file and return its path as text."""
    path.write_text(text, encoding="utf-8")
    return str(path)
