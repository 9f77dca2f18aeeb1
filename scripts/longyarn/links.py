"""A file at another place too, without a second copy on the disk where that can be had."""

import os
import shutil
from pathlib import Path


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file, or what a symbolic link leads to, to a new place; copy it from another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
