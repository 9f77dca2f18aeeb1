"""The content of report.json, from the manifests of all jobs. docs/report.md describes every key.

Here *facts* are the figures that a job wrote into its manifest. A job is named as its log is: by its stage,
with ``.variant`` after it or ``phase-1/`` before it where there are several.
"""

from dataclasses import asdict
from pathlib import Path

from longyarn.core import manifest, run_directory
from longyarn.core.lineage import chain, phases_of
from longyarn.reporting import comparisons, evidence_warnings, verdict
from longyarn.reporting.results import Results, pooled
from longyarn.rope.record import RopeRecord
from longyarn.stages import (
    DOWNLOAD_CORPUS,
    DOWNLOAD_MODEL,
    INSTRUMENTS,
    MERGE,
    PACK,
    PATCH_ROPE,
    TOKENISE,
    TRAIN,
)


def assemble(
    manifests: dict[str, dict],
    hashes: dict[str, str],
    trained_rope: str,
    thresholds: dict,
    report_code: str,
) -> dict:
    """Return report.json, but for ``disclosure`` and ``timings``: those are not in the manifests.

    ``manifests`` and their SHA-256 ``hashes`` are by job, ``trained_rope`` is the variant that training
    started from, ``thresholds`` is config section `gate`, ``report_code`` the hash of the report's code.
    """
    facts = {job: found["facts"] for job, found in manifests.items()}
    rope = RopeRecord.from_facts(facts[f"{PATCH_ROPE.name}.{trained_rope}"])
    pack, train, tokens = facts[PACK.name], facts[TRAIN.name], facts[TOKENISE.name]
    of = {stage: by_variant(facts, stage) for stage in INSTRUMENTS}
    results = results_of(rope, of["perplexity"], of["passkey"])
    links, broken = chain(manifests, hashes, trained_rope)
    return manifest.portable(
        {
            "verdict": verdict.judge(results, thresholds),
            "warnings": [
                *evidence_warnings.of_run(results, pack, train),
                *evidence_warnings.of_phases(facts),
                *broken,
                *evidence_warnings.of_differences(manifests),
            ],
            "model": model(facts[DOWNLOAD_MODEL.name], facts[MERGE.name]),
            "rope": {
                "trained": trained_rope,
                "original_length": results.original,
                "target_length": results.target,
                "factor": rope.factor,
                "variants": by_variant(facts, PATCH_ROPE.name),
            },
            "corpus": corpus(facts[DOWNLOAD_CORPUS.name], tokens),
            "held_out": held_out(tokens, results.perplexity),
            "mix": mix(pack),
            "training": training(train),
            "phases": [earlier_phase(facts, phase) for phase in phases_of(facts)],
            **evaluation(results),
            "harness": {variant: found["tasks"] for variant, found in of["harness"].items()},
            "settings": settings(manifests),
            "chain": {"links": links, "broken": len(broken)},
            "code": code(manifests) | {"report": report_code},
            "versions": manifests[TRAIN.name]["versions"],
        }
    )


def results_of(rope: RopeRecord, perplexity: dict[str, dict], passkey: dict[str, dict]) -> Results:
    """Return the results at the lengths of a RoPE, from the facts of both stages by variant."""
    return Results(
        original=rope.original_max_position_embeddings,
        target=rope.max_position_embeddings,
        perplexity=perplexity,
        passkey={variant: found["grid"] for variant, found in passkey.items()},
    )


def by_variant(facts: dict[str, dict], stage: str) -> dict[str, dict]:
    """Return the facts, by variant, of a stage that runs once for each variant."""
    prefix = f"{stage}."
    return {job.removeprefix(prefix): facts[job] for job in facts if job.startswith(prefix)}


def model(base: dict, merged: dict) -> dict:
    """Return what the base model is, and the size and the rounding error of the merged one."""
    kept = ("source", "revision", "model_type", "trust_remote_code", "bytes")
    return {key: base[key] for key in kept} | {
        "merged_bytes": merged["bytes"],
        "merge_error": merged["merge_error"],
        "disclosure": None,
    }


def corpus(downloaded: dict, tokens: dict) -> dict:
    """Return what the corpus holds, as text and as tokens."""
    kept = ("tokens", "duplicates_dropped", "duplicates_dropped_count")
    return downloaded | {key: tokens[key] for key in kept}


def held_out(tokens: dict, perplexity: dict[str, dict]) -> list[dict]:
    """Return the held-out documents, each with its tokens and how many of them were scored."""
    scored = next(iter(perplexity.values()))["documents"] if perplexity else {}
    return [
        {"id": d["id"], "tokens": d["tokens"], "scored": scored.get(d["id"], 0)}
        for d in tokens["held_out"]
    ]


def mix(pack: dict) -> dict:
    """Return the mix with its token balance, and whether the balance adds up."""
    short = sum(pack["short_tokens"].values())
    return pack | {
        "short_sequences": pack["sequences"] - pack["long_sequences"],
        "long_tokens": pack["tokens_packed"] - short,
        "checked": evidence_warnings.balanced(pack),
    }


def training(train: dict) -> dict:
    """Return what training did, with the keys that only a model trained elsewhere fills."""
    return {"source": None, "revision": None, "adapter": None, "rope_is_known": True} | train


def earlier_phase(facts: dict[str, dict], phase: str) -> dict:
    """Return what an earlier phase did: its RoPE, its mix and its training."""
    of = evidence_warnings.facts_of(facts, phase)
    rope = RopeRecord.from_facts(of[PATCH_ROPE.name])
    return {
        "name": phase,
        "rope": {
            "method": rope.method,
            "factor": rope.factor,
            "target_length": rope.max_position_embeddings,
        },
        "mix": mix(of[PACK.name]),
        "training": training(of[TRAIN.name]),
    }


def evaluation(results: Results) -> dict:
    """Return the part of report.json about perplexity and passkeys."""
    return {
        "perplexity": curves(results.perplexity, "lengths"),
        "perplexity_truncate": curves(results.perplexity, "truncate"),
        "perplexity_by_position": curves(results.perplexity, "by_position"),
        "perplexity_sliding": curves(results.perplexity, "sliding"),
        "comparisons": comparisons.compare(results),
        "passkey": results.passkey,
        "passkey_by_length": {
            variant: {length: pooled(depths) for length, depths in grid.items()}
            for variant, grid in results.passkey.items()
        },
    }


def curves(perplexity: dict[str, dict], protocol: str) -> dict[str, dict]:
    """Return each variant's figures by a protocol, without the losses of single documents."""
    kept = ("value", "low", "high", "window_mean")
    return {
        variant: {at: {key: one[key] for key in kept} for at, one in found[protocol].items()}
        for variant, found in perplexity.items()
        if protocol in found
    }


def settings(manifests: dict[str, dict]) -> dict:
    """Return every stage's settings; those of the instruments once for all variants."""
    found: dict[str, dict] = {}
    for job, entry in manifests.items():
        stage, _, variant = job.partition(".")
        if stage == PATCH_ROPE.name:
            found.setdefault(stage, {})[variant] = entry["settings"]
        elif variant and stage not in INSTRUMENTS:
            found[job] = entry["settings"]
        else:
            found[stage] = {k: v for k, v in entry["settings"].items() if k != "variant"}
    return found


def code(manifests: dict[str, dict]) -> dict[str, str]:
    """Return the hash of each stage's code."""
    found: dict[str, str] = {}
    for job, entry in manifests.items():
        found.setdefault(job.partition(".")[0], entry["code"])
    return found


def timings(directory: Path, jobs: list[str]) -> dict[str, dict]:
    """Return ``seconds`` and ``peak_memory_mb`` of those of ``jobs`` that Snakemake timed."""
    found = {job: run_directory.timing(directory, job) for job in jobs}
    return {job: asdict(timing) for job, timing in found.items() if timing}
