"""Which manifests a job was made from, and whether those are the ones that are there now.

A job is named like its log: ``train``, ``phase-1/train``, ``passkey.base``.
"""

from collections.abc import Iterable

from longyarn.stages import DOWNLOAD_MODEL, INSTRUMENTS, MERGE, PACK, PATCH_ROPE, REPORTED, TRAIN


def parts(job: str) -> tuple[str, str, str]:
    """Return a job's phase (empty for the run itself), its stage, and its variant (or empty)."""
    phase, _, rest = job.rpartition("/")
    stage, _, variant = rest.partition(".")
    return phase, stage, variant


def phases_of(jobs: Iterable[str]) -> list[str]:
    """Return the earlier phases among these jobs, in order."""
    return list(dict.fromkeys(phase for phase, _, _ in map(parts, jobs) if phase))


def chain(
    manifests: dict[str, dict], hashes: dict[str, str], trained_rope: str
) -> tuple[int, list[str]]:
    """Follow each manifest to the inputs that it was made from.

    Returns the number of links, and a sentence for each broken one. A manifest records the SHA-256 of
    its input manifests. If that differs from ``hashes``, the two come from different runs.
    """
    links, broken = 0, []
    for job, found in manifests.items():
        for name, recorded in found["inputs"].items():
            source = source_of(job, name, trained_rope, list(manifests))
            if source not in hashes:
                continue
            links += 1
            if recorded != hashes[source]:
                broken.append(f"{job} was made from another {source} than the one reported here.")
    return links, broken


def source_of(job: str, name: str, trained_rope: str, jobs: list[str]) -> str:
    """Return which of ``jobs`` wrote the manifest that ``job`` takes as its input ``name``."""
    phase, stage, variant = parts(job)
    own_weights = [
        one
        for one in (f"{MERGE.name}.{variant}", f"{DOWNLOAD_MODEL.name}.{variant}")
        if one in jobs
    ]
    if stage in (MERGE.name, PATCH_ROPE.name) and f"{MERGE.name}.{variant}" in own_weights:
        return ""  # made in another run, whose own report follows it further
    if own_weights and name == (DOWNLOAD_MODEL.key if stage == PATCH_ROPE.name else "model"):
        return own_weights[0]
    untrained = stage in INSTRUMENTS and variant != "trained"
    if name == DOWNLOAD_MODEL.key and stage in (TRAIN.name, MERGE.name):
        names = [*phases_of(jobs), ""]
        number = names.index(phase)
        return f"{names[number - 1]}/{MERGE.name}" if number else DOWNLOAD_MODEL.name
    if name == PATCH_ROPE.key and phase:
        return next(other for other in jobs if parts(other)[:2] == (phase, PATCH_ROPE.name))
    if name == PATCH_ROPE.key:
        return f"{PATCH_ROPE.name}.{variant if untrained else trained_rope}"
    if name == "model":
        return DOWNLOAD_MODEL.name if untrained else MERGE.name
    own = phase and name in (PACK.key, TRAIN.key)
    return f"{phase}/{REPORTED[name]}" if own else REPORTED.get(name, name)
