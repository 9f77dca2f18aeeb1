"""A file at another place too, without a second copy on the disk where that can be had."""

import os
import shutil
from pathlib import Path

from longyarn.cli import require_space


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file, or what a symbolic link leads to, to a new place; copy it from another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def link_weights(source: Path, directory: Path) -> None:
    """Put a model's files into a directory: the weights linked, and the small ones copied.

    Linked, a small file that is edited here would change there too.
    """
    files = sorted(file for file in source.glob("[!.]*") if file.is_file())
    disk = directory.stat().st_dev
    copied = [file for file in files if file.suffix != ".safetensors" or file.stat().st_dev != disk]
    require_space(directory, sum(file.stat().st_size for file in copied), "the model")
    for file in files:
        put = shutil.copyfile if file.suffix != ".safetensors" else link_or_copy
        put(file, directory / file.name)
