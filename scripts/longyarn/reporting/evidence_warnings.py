"""The report's warnings: one sentence for each fact that weakens the evidence.

Two kinds: what the mix, the training or the evaluation rest on, and jobs that ran differently although
they should have run alike.
"""

import numpy as np

from longyarn.core.lineage import parts, phases_of
from longyarn.reporting.results import NotEvaluated, Results
from longyarn.reporting.wording import count, percent
from longyarn.rope.record import RopeRecord
from longyarn.stages import INSTRUMENTS, PACK, PATCH_ROPE, TRAIN

FEW_DOCUMENTS = 5
SMALL_SHARE = 0.01


def of_run(results: Results, mix: dict, training: dict) -> list[str]:
    """Return the warnings about the run itself.

    ``mix`` and ``training`` hold the facts of the stages pack and train.
    """
    return [
        *of_mix(results.original, results.target, mix),
        *of_training(training),
        *of_evaluation(results),
    ]


def of_phases(facts: dict[str, dict]) -> list[str]:
    """Return the warnings about earlier phases; ``facts`` has those of every job."""
    found = []
    for phase in phases_of(facts):
        of = facts_of(facts, phase)
        rope = RopeRecord.from_facts(of[PATCH_ROPE.name])
        lengths = rope.original_max_position_embeddings, rope.max_position_embeddings
        said = [*of_mix(*lengths, of[PACK.name]), *of_training(of[TRAIN.name])]
        found += [f"In {phase}: {sentence}" for sentence in said]
    return found


def facts_of(facts: dict[str, dict], phase: str) -> dict[str, dict]:
    """Return an earlier phase's facts by stage."""
    return {parts(job)[1]: found for job, found in facts.items() if parts(job)[0] == phase}


def of_mix(original: int, target: int, mix: dict) -> list[str]:
    """Warn if the mix cannot teach the new positions, or if its tokens do not add up."""
    found = []
    share = mix["share_past_original"]
    if target > original and share < SMALL_SHARE:
        found.append(
            f"Only {percent(share)} of the packed tokens are at a position past {original:,}, so training "
            "hardly saw the new positions; add longer documents or raise mix.long_share."
        )
    if not balanced(mix):
        found.append(
            f"The token balance does not add up: {mix['tokens_in']:,} came in and {balance(mix):,} are "
            "accounted for."
        )
    return found


def balance(mix: dict) -> int:
    """Return the tokens that the mix accounts for: packed, dropped, unused, held out, duplicates."""
    parts = ("tokens_packed", "tails_dropped", "unused_by_the_mix", "held_out", "duplicates")
    return sum(mix[part] for part in parts)


def balanced(mix: dict) -> bool:
    """Tell whether every token that came in is accounted for."""
    return mix["tokens_in"] == balance(mix)


def of_training(training: dict) -> list[str]:
    """Warn if the loss rose, or if the packed sequences were not read exactly once."""
    if training.get("source"):
        return of_external_training(training)
    found = []
    losses = [loss for _, loss in training["loss"]]
    quarter = max(1, len(losses) // 4)
    first, last = np.mean(losses[:quarter]), np.mean(losses[-quarter:])
    if len(losses) > 1 and last > first:
        found.append(
            f"The training loss rose: its mean was {first:.4f} over the first quarter of the recorded steps "
            f"and {last:.4f} over the last."
        )
    if training["epochs"] > 1.0001:
        found.append(
            f"Training read the packed sequences {training['epochs']:.2f} times; reading them more than once "
            "can lead to memorization."
        )
    elif training["epochs"] < 0.99:
        found.append(
            f"Training read {percent(training['epochs'])} of the packed sequences; the mix describes "
            "all of them."
        )
    return found


def of_external_training(training: dict) -> list[str]:
    """Warn of what this run cannot show about a model that was trained elsewhere."""
    found = [
        "The model was trained elsewhere. Nothing here shows what it read, for how long, or whether held-out "
        "documents were part of it; the mix describes only what this run packed."
    ]
    if not training["rope_is_known"]:
        found.append(
            "No config.json came with the adapter, so nothing shows that it was trained with this run's RoPE."
        )
    return found


def of_evaluation(results: Results) -> list[str]:
    """Warn if the evaluation rests on few documents, or if the original length got worse."""
    found = []
    if results.perplexity:
        facts = next(iter(results.perplexity.values()))
        documents, short = len(facts["documents"]), facts["too_short"]
        if documents < FEW_DOCUMENTS:
            found.append(
                f"Perplexity rests on {documents} held-out document{'s' if documents > 1 else ''}; "
                f"with fewer than {FEW_DOCUMENTS}, its interval says little."
            )
        if short:
            longest = max(int(length) for length in facts["lengths"])
            found.append(
                f"{len(short)} held-out document{'s' if len(short) > 1 else ''} with fewer than "
                f"{longest:,} tokens {'were' if len(short) > 1 else 'was'} left out of perplexity: "
                f"{', '.join(short)}."
            )
    try:
        trained = results.retrieved("trained", results.original)
        base = results.retrieved("base", results.original)
    except NotEvaluated:
        return found
    if trained["high"] < base["low"]:
        found.append(
            f"At its original length of {results.original:,} tokens, the trained model retrieves "
            f"{count(trained)} passkeys; the base retrieves {count(base)}."
        )
    return found


def of_differences(manifests: dict[str, dict]) -> list[str]:
    """Warn of libraries, code or settings that differ between jobs although they should be the same."""
    found = []
    for library, version in manifests[TRAIN.name]["versions"].items():
        others = {
            job: entry["versions"].get(library)
            for job, entry in manifests.items()
            if entry["versions"].get(library) != version
        }
        for job, other in list(others.items())[:1]:
            more = f" and {len(others) - 1} more jobs" if len(others) > 1 else ""
            found.append(f"{job}{more} ran with {library} {other}, training with {version}.")
    for stage in (*INSTRUMENTS, PATCH_ROPE.name):
        entries = {job: m for job, m in manifests.items() if job.partition(".")[0] == stage}
        if len({entry["code"] for entry in entries.values()}) > 1:
            found.append(f"The variants of {stage} were not made by the same code.")
        kept = [
            {k: v for k, v in entry["settings"].items() if k != "variant"}
            for entry in entries.values()
        ]
        if stage in INSTRUMENTS and any(one != kept[0] for one in kept):
            found.append(f"The variants of {stage} were not evaluated with the same settings.")
    return found
