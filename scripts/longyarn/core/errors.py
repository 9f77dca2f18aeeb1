"""Errors that a user can fix: one clear sentence and exit code 1, never a traceback."""

import errno
import functools
import re
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can fix. The message is one sentence: what is wrong, and how to fix it."""


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a stage's ``main``: a user's mistake becomes one sentence on stderr and exit code 1.

    Any other error keeps its traceback, because then the fault is ours.
    """

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except UserError as error:
            sys.exit(f"error: {error}")
        except PermissionError as error:
            sys.exit(f"error: no permission ({error}); grant it or choose another path")
        except Exception as error:
            if not disk_is_full(error):
                raise
            sys.exit(f"error: no space left on the disk ({error}); free some and run again")

    return run


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message for use in a sentence, without passwords in addresses."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"//[^/@\s]+@", "//", lines[0]).rstrip(".: ")


def disk_is_full(error: BaseException) -> bool:
    """Tell whether an error, or its cause, is a full disk; safetensors reports that only in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch gives no cause when it cannot write its archive.
    if any(
        words in str(error) for words in ("No space left on device", "PytorchStreamWriter failed")
    ):
        return True
    behind = error.__cause__ or error.__context__
    return behind is not None and disk_is_full(behind)
