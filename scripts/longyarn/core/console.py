"""What a person reads while a stage runs: progress bars, lines in a log, and durations in words."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator


def progress(
    items: Iterable,
    total: int | None,
    label: str,
    every: float = 10.0,
    done: int = 0,
    size: Callable[[object], int] = lambda item: 1,
) -> Iterator:
    """Yield ``items`` and show progress: a bar on a terminal, a line every ``every`` seconds in a log.

    ``total`` is the number of items, or the sum of ``size`` over them; None if it is unknown. ``done``
    of that was finished earlier.
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
    """Yield ``parts``, each ``(amount, tokens)`` of finished work, and show tokens and the time left.

    ``total`` is the sum of all amounts. Shows a bar on a terminal, a line every ``every`` seconds in a log.
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
    """Return tokens, and tokens per second, in words."""
    return f"{tokens / 1e6:.1f} M tokens, {tokens / 1e6 / max(seconds, 1e-9):.2f} M/s"


def duration(seconds: float) -> str:
    """Return seconds as ``7.2 s``, ``42 s``, ``12 min 05 s`` or ``3 h 40 min``."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"
