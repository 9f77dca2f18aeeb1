"""The chain: a job, named as its log is, and the manifests that it was made from."""

from longyarn.evaluation.variant_model import INSTRUMENTS

STAGES = {
    "base": "download_model", "corpus": "download_corpus", "tokens": "tokenise", "pack": "pack",
    "train": "train", "merge": "merge",
}  # fmt: skip


def parts(job: str) -> tuple[str, str, str]:
    """Return a job's phase, empty for the run itself, its stage and its variant."""
    phase, _, rest = job.rpartition("/")
    stage, _, variant = rest.partition(".")
    return phase, stage, variant


def phases_of(jobs) -> list[str]:
    """Return the earlier phases, in order."""
    return list(dict.fromkeys(phase for phase, _, _ in map(parts, jobs) if phase))


def chain(
    manifests: dict[str, dict], hashes: dict[str, str], trained_rope: str
) -> tuple[int, list[str]]:
    """Follow each manifest to the inputs it was made from; return the links and the broken ones.

    A manifest records the SHA-256 of its input manifests. Where that is not the one reported here,
    the two come from different runs, and a sentence says so.
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
    """Return the one of ``jobs`` whose manifest another job takes as its input ``name``."""
    phase, stage, variant = parts(job)
    own_weights = [j for j in (f"merge.{variant}", f"download_model.{variant}") if j in jobs]
    if stage in ("merge", "patch_rope") and f"merge.{variant}" in own_weights:
        return ""  # of another run, whose own report follows it further
    if own_weights and name == ("base" if stage == "patch_rope" else "model"):
        return own_weights[0]
    untrained = stage in INSTRUMENTS and variant != "trained"
    if name == "base" and stage in ("train", "merge"):
        names = [*phases_of(jobs), ""]
        number = names.index(phase)
        return f"{names[number - 1]}/merge" if number else "download_model"
    if name == "rope" and phase:
        return next(other for other in jobs if parts(other)[:2] == (phase, "patch_rope"))
    if name == "rope":
        return f"patch_rope.{variant if untrained else trained_rope}"
    if name == "model":
        return "download_model" if untrained else "merge"
    own = phase and name in ("pack", "train")
    return f"{phase}/{STAGES[name]}" if own else STAGES.get(name, name)
