"""The thresholds of config section `gate`: which figure each concerns, and what it needs evaluated."""

from dataclasses import dataclass

from longyarn.core.errors import UserError


@dataclass(frozen=True)
class Needs:
    """What has to be evaluated before a threshold can be compared with anything.

    ``check`` names the check of the verdict; ``at`` tells at which of the lengths, original and target.
    """

    check: str
    instrument: str
    variants: tuple[str, ...]
    at: tuple[str, ...]


# merge_error is not among them: the merge itself measures it.
NEEDS = {
    "perplexity_ratio": Needs(
        "trained_perplexity_holds", "perplexity", ("trained",), ("original", "target")
    ),
    "retention_ratio": Needs(
        "original_length_kept", "perplexity", ("trained", "base"), ("original",)
    ),
    "passkey_rate": Needs("trained_passkey_found", "passkey", ("trained",), ("target",)),
}
THRESHOLDS = (*NEEDS, "merge_error")
KEY_OF = {needs.check: key for key, needs in NEEDS.items()}
MEANING = {"original": "the model's original length", "target": "rope.target_length"}


def check_variants(thresholds: dict, variants: list[str]) -> None:
    """Refuse a threshold on a variant that is not evaluated."""
    for key, needs in NEEDS.items():
        missing = [name for name in needs.variants if name not in variants]
        if thresholds[key] is not None and missing:
            raise UserError(
                f"gate.{key} needs the variant {missing[0]!r}; add it to evaluation.variants, or set "
                f"gate.{key} to null"
            )


def check_lengths(
    thresholds: dict, lengths: dict[str, list[int] | None], known: dict[str, int]
) -> None:
    """Refuse a threshold at a length that is not evaluated.

    ``lengths`` are those of each instrument in tokens. None stands for derived lengths, which include both.
    ``known`` has the original and the target length; a length that is not known yet is absent.
    """
    extended = known.get("original") != known.get("target")
    for key, needs in NEEDS.items():
        # The ratio over lengths means nothing where there is one length.
        if thresholds[key] is None or (key == "perplexity_ratio" and not extended):
            continue
        evaluated = lengths[needs.instrument]
        for name in needs.at if evaluated else ():
            if name in known and known[name] not in evaluated:
                raise UserError(
                    f"gate.{key} needs evaluation.{needs.instrument}.lengths to have {MEANING[name]}, "
                    f"{known[name]}; add it, or set gate.{key} to null"
                )
