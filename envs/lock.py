"""Write the lock files: from each short X.in the X.txt with every package's version and hashes.

`make lock` runs this. A lock keeps its versions until its .in file asks for others; delete the lock
first to have everything at its newest.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

# What uv is told beside the .in file. In this order, because the later ones are constrained by the
# earlier ones (their lines `-c run.txt`).
LOCKS = {
    # torch has its own locks, because each build has its own files.
    "run": ["--no-emit-package", "torch", "--no-emit-package", "setuptools"],
    "build": [],
    "cpu": [],
    "cuda": [],
    "flash": ["--no-deps"],
    "slurm": [],
    "dev": [],
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name in LOCKS:
        write(name)
        print(f"envs/{name}.txt", file=sys.stderr)


def write(name: str) -> None:
    """Lock one .in file, and head the lock with what it was made from."""
    lock = HERE / f"{name}.txt"
    if name == "cpu":
        body = hash_of_cpu_torch()
    else:
        resolve(name)
        lines = lock.read_text(encoding="utf-8").splitlines(keepends=True)
        body = "".join(line for line in lines if not line.startswith("# Locked by"))
    lock.write_text(header(name) + body, encoding="utf-8")


def resolve(name: str) -> None:
    """Let uv lock one .in file, for Python 3.11 and 3.12 on any platform."""
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--generate-hashes", "--universal"]
    command += ["--python-version", "3.11", f"{name}.in", "-o", f"{name}.txt", *LOCKS[name]]
    command += ["--config-file", "uv.toml"] if name == "run" else ["--no-config"]
    run(command, name)


def hash_of_cpu_torch() -> str:
    """Return the lock of the CPU image's torch: the wheel that pip's configuration gives.

    uv cannot make it: it does not hash files that lie in a directory of wheels.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-r", "cpu.in"]
        command += ["--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64"]
        command += ["--python-version", "3.11", "--dest", directory]
        run(command, "cpu")
        (wheel,) = Path(directory).iterdir()
        name, version, _ = wheel.name.split("-", 2)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f"{name}=={version} \\\n    --hash=sha256:{digest}\n    # via -r cpu.in\n"


def run(command: list[str], name: str) -> None:
    """Run a resolver in envs/, or stop with a sentence below its own words."""
    if subprocess.run(command, cwd=HERE).returncode:
        sys.exit(f"error: envs/{name}.in was not locked; the lines above say why")


def header(name: str) -> str:
    """Return a lock's first line. It has the hash of what a person wrote, so that a test sees an
    .in file that was edited and not locked again.
    """
    digest = hashlib.sha256(repr(LOCKS[name]).encode())
    for source in (f"{name}.in", "torch.txt", "uv.toml"):
        digest.update((HERE / source).read_bytes())
    return f"# Locked by `make lock` from {name}.in ({digest.hexdigest()[:12]}).\n"


if __name__ == "__main__":
    main()
