"""What each stage asks of a cluster: memory, minutes and GPUs, derived from the config."""

LEAST_MB = 1000  # Snakemake starts anew inside a job, about 140 MB a level
GROWTH = 1.5  # of memory and minutes, with each attempt


def request(config: dict, stage: str, what: str, attempt: int = 1) -> int:
    """Return ``mem_mb`` (MB of a node) or ``runtime`` (minutes) of a stage, at a 1-based attempt."""
    first = {"mem_mb": 2 * LEAST_MB, "runtime": 60}[what]
    return round(first * GROWTH ** (attempt - 1))
