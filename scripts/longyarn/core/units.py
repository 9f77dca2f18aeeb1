"""Quantities in words that a person reads."""


def duration(seconds: float) -> str:
    """Return seconds as ``7.2 s``, ``42 s``, ``12 min 05 s`` or ``3 h 40 min``."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"
