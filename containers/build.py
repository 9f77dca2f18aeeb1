"""Build an image of the workflow: push it and record its digest, or write it to one .sif file.

    make image IMAGE=cpu REGISTRY=registry.example.org/team
    make sif IMAGE=cpu

pip's settings on this machine (mirrors, directories of wheels, certificates) apply inside the build, and
are not stored in the image.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from longyarn.cluster import container_images  # noqa: E402
from longyarn.config.layers import layered  # noqa: E402
from longyarn.core.errors import UserError, program  # noqa: E402
from longyarn.data.python_packages import pip_settings  # noqa: E402

RECORD = ROOT / "containers" / "images.yaml"


def main() -> None:
    """Build one image in the form that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("form", choices=["push", "sif"], help="push to a registry, or one file")
    parser.add_argument("--image", choices=list(container_images.LOCKS), required=True)
    parser.add_argument("--registry", default="", help="where to push, such as ghcr.io/team")
    parser.add_argument("--base", help="base to use instead of the Dockerfile's, as name@sha256:…")
    parser.add_argument("--torch-index-url", default="", help="another index to find torch in")
    parser.add_argument("--config", type=Path, nargs="*", default=[], help="config files")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    with pip_for_the_build(arguments.torch_index_url) as binds:
        if arguments.form == "sif":
            build_sif(arguments.image, arguments.config, binds)
        else:
            push(arguments.image, arguments.registry, arguments.base, binds)


@contextlib.contextmanager
def pip_for_the_build(torch_index_url: str) -> Iterator[dict[Path, str]]:
    """Yield what to bind below /mnt during the build, as {path here: path inside}.

    It is a pip.conf with the pip settings of this machine, and the files and directories that they name.
    In the pip.conf those have their paths inside. Every base has /mnt, so no empty directory stays behind.
    """
    settings = pip_settings()
    if torch_index_url:
        settings["extra-index-url"] = f"{settings.get('extra-index-url', '')} {torch_index_url}"
    with tempfile.TemporaryDirectory() as directory:
        mount = Path(directory)
        binds = {mount: "/mnt"}

        def inside(word: str) -> str:
            path = Path(word.removeprefix("file://"))
            if not path.is_absolute() or not path.exists():
                return word
            if word.startswith("file://"):  # an index, whose links lead to directories beside it
                path = path.parent
            name = str(len(binds))
            (mount / name).mkdir() if path.is_dir() else (mount / name).touch()
            binds[path.resolve()] = f"/mnt/{name}"
            return word.replace(str(path), f"/mnt/{name}")

        lines = [
            f"{key} = {' '.join(inside(word) for word in value.split())}"
            for key, value in settings.items()
        ]
        (mount / "pip.conf").write_text("[global]\n" + "\n".join(lines) + "\n", encoding="utf-8")
        yield binds


def push(image: str, registry: str, base: str | None, binds: dict[Path, str]) -> None:
    """Build from the Dockerfile, push, and record the pushed digest in containers/images.yaml."""
    if not registry:
        raise UserError(
            f"no registry to push to; run `make image IMAGE={image} REGISTRY=registry.example.org/team`"
        )
    builder = next((name for name in ("podman", "buildah") if shutil.which(name)), None)
    if builder is None:
        raise UserError("no podman or buildah on the path; install one, or use `make sif`")
    recipe = container_images.recipe(image, "Dockerfile", ROOT)
    name = f"{registry.rstrip('/')}/longyarn-{image}"
    command = [builder, "build", "--file", f"containers/{image}.Dockerfile"]
    command += ["--tag", f"{name}:{recipe}", "--build-arg", f"RECIPE={recipe}"]
    command += ["--build-arg", f"BASE={base}"] if base else []
    for here, there in binds.items():
        command += ["--volume", f"{here}:{there}:ro"]
    run([*command, "."])
    with tempfile.NamedTemporaryFile(mode="r", encoding="utf-8") as file:
        run([builder, "push", "--digestfile", file.name, f"{name}:{recipe}"])
        digest = file.read().strip()
    record(image, f"docker://{name}@{digest}", recipe)
    print(f"{name}@{digest}")


def record(image: str, address: str, recipe: str) -> None:
    """Write the pushed image into containers/images.yaml, and keep its comment."""
    text = RECORD.read_text(encoding="utf-8")
    entries = yaml.safe_load(text) | {image: {"image": address, "recipe": recipe}}
    comment = "".join(re.findall(r"^#.*\n", text, re.M))
    partial = RECORD.with_suffix(".partial")
    partial.write_text(comment + yaml.safe_dump(entries, width=200), encoding="utf-8")
    os.replace(partial, RECORD)


def build_sif(image: str, configs: list[Path], binds: dict[Path, str]) -> None:
    """Build from the Apptainer definition, without root, to the path where a run looks for it."""
    target = container_images.sif(image, layered(*configs)["paths"]["cache"], ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial.sif")
    command = [container_images.program(), "build", "--force"]
    for here, there in binds.items():
        command += ["--bind", f"{here}:{there}:ro"]
    run([*command, str(partial), f"containers/{image}.def"])
    os.replace(partial, target)
    print(target)


def run(command: list[str]) -> None:
    """Run a builder; if it fails, stop with one sentence after its own output."""
    try:
        done = subprocess.run(command)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on the path; install it") from None
    if done.returncode:
        raise UserError(
            f"`{command[0]} {command[1]}` failed; fix what it reports above and run it again"
        )


if __name__ == "__main__":
    program(main)()
