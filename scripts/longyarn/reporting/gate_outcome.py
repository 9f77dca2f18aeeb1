"""A run's figures against the thresholds of config section `gate`, for the gate and the model card."""

from longyarn.config.thresholds import NEEDS
from longyarn.reporting.wording import clause, percent


def compare(thresholds: dict, verdict: dict, error: float, tensor: str | None) -> list[dict]:
    """Return ``threshold``, ``passed``, ``decided`` and ``sentence`` for each threshold that is set.

    ``verdict`` is that of report.json. ``error`` is the largest relative rounding error of the merge, in the
    tensor ``tensor``. A check that means nothing because RoPE was not extended is left out. A check that
    could not be made has not passed.
    """
    asked = {key: limit for key, limit in thresholds.items() if limit is not None}
    outcomes = {
        check["name"]: (check["passed"], check["decided"], clause(check["sentence"]))
        for check in verdict["checks"]
    }
    outcomes |= {gap["name"]: (False, False, gap["reason"]) for gap in verdict["not_checked"]}
    found = {
        key: outcomes[needs.check]
        for key, needs in NEEDS.items()
        if key in asked and needs.check in outcomes
    }
    if "merge_error" in asked:
        sentence = (
            f"rounding took {percent(error)} of what training changed in {tensor or 'any tensor'}, where "
            f"at most {percent(asked['merge_error'])} is required (merge.dtype: fp32 loses least)"
        )
        found["merge_error"] = (error <= asked["merge_error"], True, sentence)
    return [
        {"threshold": key, "passed": passed, "decided": decided, "sentence": said}
        for key, (passed, decided, said) in found.items()
    ]


def missed(compared: list[dict]) -> str:
    """Return the thresholds that were missed as a clause, empty if none was."""
    return "; and ".join(
        f"{one['sentence']} (gate.{one['threshold']})" for one in compared if not one["passed"]
    )
