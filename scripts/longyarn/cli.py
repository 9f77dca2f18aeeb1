"""How every stage speaks to its user: one sentence for a mistake, lines or a bar for progress."""

import errno
import functools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend. The message is one sentence: what is wrong, and the mend."""


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a stage's ``main``: a user's mistake becomes one sentence on stderr and exit code 1.

    Anything unforeseen keeps its traceback, because then the fault is ours.
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
    """Return the first line of a library's message, without passwords in addresses, for a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"//[^/@\s]+@", "//", lines[0]).rstrip(".: ")


def disk_is_full(error: BaseException) -> bool:
    """Tell whether an error, or one behind it, is a full disk; safetensors says so only in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch names no cause when its archive cannot be written.
    if any(
        words in str(error) for words in ("No space left on device", "PytorchStreamWriter failed")
    ):
        return True
    behind = error.__cause__ or error.__context__
    return behind is not None and disk_is_full(behind)


def require_space(directory: Path, size: int, what: str) -> None:
    """Stop before the work starts when ``directory``'s disk cannot hold ``size`` more bytes."""
    existing = directory.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(
            f"no space left for {what}: {directory} has {free / 1e9:.2f} GB free and "
            f"{size / 1e9:.2f} GB are needed; free some or move the results to another disk"
        )


def progress(
    items: Iterable,
    total: int | None,
    label: str,
    every: float = 10.0,
    done: int = 0,
    size: Callable[[object], int] = lambda item: 1,
) -> Iterator:
    """Yield ``items``, showing a bar on a terminal and a line every ``every`` seconds in a log.

    ``total`` counts the items, or what ``size`` says of each; None where it is unknown. ``done`` of it
    was done before.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=label, initial=done, unit_scale=True) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    start = last = time.monotonic()
    begun = done
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - last >= every or (total is not None and done >= total):
            last = now
            of = "" if total is None else f"/{total}"
            left = (total or 0) - done
            more = f", {left * (now - start) / (done - begun):.0f} s left" if left > 0 else ""
            print(f"{label}: {done}{of} ({now - start:.0f} s{more})", file=sys.stderr, flush=True)


def token_progress(
    parts: Iterable[tuple[int, int]], total: int, label: str, every: float = 10.0
) -> Iterator[tuple[int, int]]:
    """Yield ``parts``, each ``(amount, tokens)`` of work done, showing tokens and the time left.

    ``total`` is the sum of all amounts. A bar on a terminal, a line every ``every`` seconds in a log.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        tokens = 0
        with tqdm(
            total=total,
            desc=label,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}",
        ) as bar:
            for amount, count in parts:
                yield amount, count
                tokens += count
                bar.set_postfix_str(rate(tokens, bar.format_dict["elapsed"]), refresh=False)
                bar.update(amount)
        return
    start = last = time.monotonic()
    done = tokens = 0
    for amount, count in parts:
        yield amount, count
        done, tokens, now = done + amount, tokens + count, time.monotonic()
        if now - last >= every or done == total:
            last, left = now, (now - start) * (total - done) / max(done, 1)
            print(
                f"{label}: {done / max(total, 1):.0%}, {rate(tokens, now - start)}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def rate(tokens: int, seconds: float) -> str:
    """Write tokens and tokens a second."""
    return f"{tokens / 1e6:.1f} M tokens, {tokens / 1e6 / max(seconds, 1e-9):.2f} M/s"


def set_up_torch(threads: int) -> None:
    """Fix torch's thread count and quieten transformers' bars and advice.

    Sums depend on the thread count, so it comes from the config, not from --cores.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
