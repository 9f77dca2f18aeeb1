"""Write the lock files: from each short X.in the X.txt with every package's version and hashes.

`make lock` runs this. A lock keeps its versions until its .in file asks for others; delete the lock
first to have everything at its newest.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

# What uv is told beside the .in file. In this order, because the later ones are constrained by the
# earlier ones (their lines `-c run.txt`).
LOCKS = {
    # torch has its own locks, because each build has its own files.
    "run": ["--config-file=uv.toml", "--no-emit-package=torch", "--no-emit-package=setuptools"],
    "build": ["--no-config"],
    "cpu": ["--no-config"],
    "cuda": ["--no-config"],
    "flash": ["--no-config", "--no-deps"],
    "slurm": ["--no-config"],
    "harness": ["--config-file=uv.toml", "--no-emit-package=torch", "--no-emit-package=setuptools"],
    "dev": ["--no-config"],
}


def main() -> None:
    """Lock every .in file."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, options in LOCKS.items():
        lock = HERE / f"{name}.txt"
        with tempfile.TemporaryDirectory() as directory:
            if name == "cpu":
                download_cpu_torch(directory)
                options = [*options, "--find-links", directory]
            compile_lock(name, lock, options)
        lines = lock.read_text(encoding="utf-8").splitlines(keepends=True)
        body = "".join(line for line in lines if not line.startswith("# Locked by"))
        lock.write_text(header(name) + body, encoding="utf-8")
        print(f"envs/{lock.name}", file=sys.stderr)


def compile_lock(name: str, lock: Path, options: list[str]) -> None:
    """Let uv write ``lock``: Python 3.11 and later, every platform, every hash."""
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--generate-hashes", "--universal"]
    command += ["--python-version", "3.11", "--output-file", str(lock), *options]
    run(*command, f"{name}.in")


def download_cpu_torch(directory: str) -> None:
    """Fetch the CPU image's torch as pip is configured to find it; uv does not know how."""
    (pin,) = re.findall(r"^torch==.*$", (HERE / "cpu.in").read_text(encoding="utf-8"), re.M)
    wanted = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"]
    wanted += ["--only-binary", ":all:", "--no-deps", "--quiet", "--dest", directory]
    run(sys.executable, "-m", "pip", "download", *wanted, pin)


def run(*command: str) -> None:
    """Run a resolver in envs/, or stop with a sentence below its own words."""
    if subprocess.run(command, cwd=HERE).returncode:
        sys.exit(f"error: {command[-1]} could not be locked; the lines above say why")


def header(name: str) -> str:
    """Return a lock's first line, with a hash of what people wrote.

    So a test sees an .in file that was edited and not locked again.
    """
    digest = hashlib.sha256(repr(LOCKS[name]).encode())
    for source in (f"{name}.in", "torch.txt", "uv.toml"):
        digest.update((HERE / source).read_bytes())
    return f"# Locked by `make lock` from {name}.in ({digest.hexdigest()[:12]}).\n"


if __name__ == "__main__":
    main()
