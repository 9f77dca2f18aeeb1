"""Write the report: one page that a person reads, and the same figures as JSON and PNG.

Everything comes from the manifests. Nothing is measured or loaded here, so that the report is made in
seconds and can be made anew at any time. docs/report.md describes every key of the JSON.
"""

import argparse
import csv
import json
import math
from pathlib import Path

from longyarn.core import job_record, manifest
from longyarn.core.code_hash import code_hash
from longyarn.core.console import duration
from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory, read_json, sha256, write_json, write_text
from longyarn.core.lineage import chain, parts, phases_of
from longyarn.reporting import comparisons, figures, verdict
from longyarn.stages import INSTRUMENTS, REPORTED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, stage in REPORTED.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"manifest of {stage}")
    parser.add_argument(
        "--models", type=named, nargs="*", default=[],
        help="variants with weights of their own, variant=manifest",
    )  # fmt: skip
    parser.add_argument("--rope", type=named, nargs="+", required=True, help="variant=manifest")
    parser.add_argument("--trained-rope", required=True, help="variant that training started from")
    for name in INSTRUMENTS:
        parser.add_argument(f"--{name}", type=named, nargs="*", default=[], help="variant=manifest")
    parser.add_argument(
        "--phases", type=named, nargs="*", default=[],
        help="manifests of earlier phases, in order: phase-1/pack=manifest, phase-1/train=…",
    )  # fmt: skip
    parser.add_argument(
        "--thresholds", type=json.loads, required=True, help="config section `gate`, as JSON"
    )
    parser.add_argument(
        "--disclosure", default="", help="what the base has in common with the tests"
    )
    parser.add_argument("--template", type=Path, required=True, help="Jinja2 template of the page")
    parser.add_argument("--benchmarks", type=Path, required=True, help="directory of job timings")
    parser.add_argument("--html", type=Path, required=True, help="page to write")
    parser.add_argument("--json", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--figures", type=Path, required=True, help="directory of PNG files to write"
    )
    arguments = parser.parse_args()

    paths = jobs(arguments)
    if f"patch_rope.{arguments.trained_rope}" not in paths:
        raise UserError(f"--rope lacks the trained variant {arguments.trained_rope!r}; add it")
    manifests = {job: read_stage(path, job) for job, path in paths.items()}
    hashes = {job: sha256(path) for job, path in paths.items()}
    report = assemble(manifests, hashes, arguments.trained_rope, arguments.thresholds)
    report["model"]["disclosure"] = arguments.disclosure or None
    # Without training here, a time of training is of an earlier run.
    timed = [job for job in manifests if job != "train" or manifests[job]["stage"] == "train"]
    report["timings"] = timings(arguments.benchmarks, timed)
    with new_directory(arguments.figures) as directory:
        images = figures.write(report, directory)
    job_record.write_environment(arguments.json)
    write_json(arguments.json, report)
    write_text(arguments.html, page(arguments.template, report, images))


def named(text: str) -> tuple[str, Path]:
    """Read a command-line argument of the form NAME=path."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=path")
    return name, Path(path)


def jobs(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return each job's manifest; a job is a stage, or stage.variant, as its log is named."""
    paths = {stage: getattr(arguments, name) for name, stage in REPORTED.items()}
    paths |= {f"{read_json(path)['stage']}.{variant}": path for variant, path in arguments.models}
    paths |= {f"patch_rope.{variant}": path for variant, path in arguments.rope}
    for stage in INSTRUMENTS:
        paths |= {f"{stage}.{variant}": path for variant, path in getattr(arguments, stage)}
    return paths | dict(arguments.phases)


def read_stage(path: Path, job: str) -> dict:
    """Read a manifest and make sure that it is this job's."""
    found = manifest.read(path)
    stage = parts(job)[1]
    if found["stage"] != stage and (stage, found["stage"]) != ("train", "adopt"):
        raise UserError(
            f"{path} is the manifest of {found['stage']!r}, not of {stage!r}; mend the call"
        )
    return found


def assemble(
    manifests: dict[str, dict], hashes: dict[str, str], trained_rope: str, thresholds: dict
) -> dict:
    """Return report.json, all but the timings, which differ between equal runs."""
    facts = {job: found["facts"] for job, found in manifests.items()}
    rope, pack, train = facts[f"patch_rope.{trained_rope}"], facts["pack"], facts["train"]
    of = {stage: variants(facts, stage) for stage in (*INSTRUMENTS, "patch_rope")}
    shown = verdict.Figures(
        original=rope["original_max_position_embeddings"],
        target=rope["max_position_embeddings"],
        perplexity=of["perplexity"],
        passkey={variant: found["grid"] for variant, found in of["passkey"].items()},
    )
    links, broken = chain(manifests, hashes, trained_rope)
    return manifest.portable(
        {
            "verdict": verdict.judge(shown, thresholds),
            "warnings": [
                *verdict.warnings(shown, pack, train), *warnings_of_phases(facts), *broken,
                *disagreements(manifests),
            ],
            "model": model(facts["download_model"], facts["merge"]),
            "rope": {
                "trained": trained_rope,
                "original_length": shown.original,
                "target_length": shown.target,
                "factor": rope["factor"],
                "variants": of["patch_rope"],
            },
            "corpus": facts["download_corpus"] | {
                key: facts["tokenise"][key]
                for key in ("tokens", "duplicates_dropped", "duplicates_dropped_count")
            },
            "held_out": held_out(facts["tokenise"], shown.perplexity),
            "mix": mix(pack),
            "training": training(train),
            "phases": [earlier(facts, phase) for phase in phases_of(facts)],
            "perplexity": curves(shown.perplexity, "lengths"),
            "perplexity_truncate": curves(shown.perplexity, "truncate"),
            "perplexity_by_position": curves(shown.perplexity, "by_position"),
            "perplexity_sliding": curves(shown.perplexity, "sliding"),
            "comparisons": comparisons.compare(shown),
            "passkey": shown.passkey,
            "passkey_by_length": {
                variant: {length: verdict.pooled(depths) for length, depths in grid.items()}
                for variant, grid in shown.passkey.items()
            },
            "harness": {variant: found["tasks"] for variant, found in of["harness"].items()},
            "settings": settings(manifests),
            "chain": {"links": links, "broken": len(broken)},
            "code": code(manifests),
            "versions": manifests["train"]["versions"],
        }
    )  # fmt: skip


def variants(facts: dict[str, dict], stage: str) -> dict[str, dict]:
    """Return the facts of a stage that runs once a variant, by variant."""
    prefix = f"{stage}."
    return {job.removeprefix(prefix): facts[job] for job in facts if job.startswith(prefix)}


def model(base: dict, merged: dict) -> dict:
    """Return what the base model is, and the size of what was made of it and what rounding took."""
    kept = ("source", "revision", "model_type", "trust_remote_code", "bytes")
    return {key: base[key] for key in kept} | {
        "merged_bytes": merged["bytes"], "merge_error": merged["merge_error"],
    }  # fmt: skip


def held_out(tokens: dict, perplexity: dict[str, dict]) -> list[dict]:
    """Return the held-out documents, each with its tokens and how many of them were scored."""
    scored = next(iter(perplexity.values()))["documents"] if perplexity else {}
    return [
        {"id": d["id"], "tokens": d["tokens"], "scored": scored.get(d["id"], 0)}
        for d in tokens["held_out"]
    ]


def curves(perplexity: dict[str, dict], protocol: str) -> dict[str, dict]:
    """Return each variant's figures by a protocol, without the documents' losses; none if not made."""
    kept = ("value", "low", "high", "window_mean")
    return {
        variant: {at: {key: one[key] for key in kept} for at, one in found[protocol].items()}
        for variant, found in perplexity.items()
        if protocol in found
    }


def mix(pack: dict) -> dict:
    """Return the mix with its token balance, which ``verdict.balance`` adds up."""
    short = sum(pack["short_tokens"].values())
    return pack | {
        "short_sequences": pack["sequences"] - pack["long_sequences"],
        "long_tokens": pack["tokens_packed"] - short,
        "checked": verdict.balanced(pack),
    }


def training(train: dict) -> dict:
    """Return what training did, with the keys that only a model trained elsewhere fills."""
    return {"source": None, "revision": None, "adapter": None, "rope_is_known": True} | train


def facts_of(facts: dict[str, dict], phase: str) -> dict[str, dict]:
    """Return an earlier phase's facts by stage."""
    return {parts(job)[1]: found for job, found in facts.items() if parts(job)[0] == phase}


def earlier(facts: dict[str, dict], phase: str) -> dict:
    """Return what an earlier phase did: its RoPE, its mix and its training."""
    of = facts_of(facts, phase)
    rope = of["patch_rope"]
    return {
        "name": phase,
        "rope": {
            "method": rope["method"],
            "factor": rope["factor"],
            "target_length": rope["max_position_embeddings"],
        },
        "mix": mix(of["pack"]),
        "training": training(of["train"]),
    }


def warnings_of_phases(facts: dict[str, dict]) -> list[str]:
    """Return a sentence for each thing that was amiss in an earlier phase."""
    found = []
    for phase in phases_of(facts):
        of = facts_of(facts, phase)
        rope = of["patch_rope"]
        lengths = verdict.Figures(
            rope["original_max_position_embeddings"], rope["max_position_embeddings"], {}, {}
        )
        said = [*verdict.mix_warnings(lengths, of["pack"]), *verdict.training_warnings(of["train"])]
        found += [f"In {phase}: {sentence}" for sentence in said]
    return found


def settings(manifests: dict[str, dict]) -> dict:
    """Return every stage's settings; those of the instruments once, without the variant."""
    found: dict[str, dict] = {}
    for job, entry in manifests.items():
        stage, _, variant = job.partition(".")
        if stage == "patch_rope":
            found.setdefault(stage, {})[variant] = entry["settings"]
        elif variant and stage not in INSTRUMENTS:
            found[job] = entry["settings"]
        else:
            found[stage] = {k: v for k, v in entry["settings"].items() if k != "variant"}
    return found


def code(manifests: dict[str, dict]) -> dict[str, str]:
    """Return the hash of each stage's code, this one's too."""
    found: dict[str, str] = {}
    for job, entry in manifests.items():
        found.setdefault(job.partition(".")[0], entry["code"])
    return found | {"report": code_hash(Path(__file__))}


def disagreements(manifests: dict[str, dict]) -> list[str]:
    """Return a sentence for each library, code or setting that differs where it should be the same."""
    found = []
    for library, version in manifests["train"]["versions"].items():
        others = {
            job: entry["versions"].get(library)
            for job, entry in manifests.items()
            if entry["versions"].get(library) != version
        }
        for job, other in list(others.items())[:1]:
            more = f" and {len(others) - 1} more jobs" if len(others) > 1 else ""
            found.append(f"{job}{more} ran with {library} {other}, training with {version}.")
    for stage in (*INSTRUMENTS, "patch_rope"):
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


def timings(directory: Path, names: list[str]) -> dict[str, dict]:
    """Return each job's seconds and peak memory in MB from Snakemake's benchmarks, where there are.

    A job that went on after a stop has the figures of its last attempt.
    """
    found = {}
    for job in names:
        path = directory / f"{job}.tsv"
        if not path.is_file():
            continue
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        if rows and (seconds := number(rows[-1].get("s"))) is not None:
            found[job] = {"seconds": seconds, "peak_memory_mb": number(rows[-1].get("max_rss"))}
    return found


def number(text: str | None) -> float | None:
    """Read a figure of a benchmark; a job too short to be sampled has none."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def page(template: Path, report: dict, images: dict) -> str:
    """Return the page: the template filled with the report and its figures."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "figure": verdict.significant,
        "percent": lambda share: verdict.percent(share).replace(" ", "\N{NO-BREAK SPACE}"),
        "points": comparisons.points,
        "plain": lambda value: f"{value:,.6g}",
        "range": lambda figure, words=verdict.significant: (
            verdict.between(figure["low"], figure["high"], words)
            .replace(" to ", "–")
            .replace(" %", "\N{NO-BREAK SPACE}%")
        ),
        "prose": lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%"),
        "duration": duration,
        "size": size,
    }
    try:
        filled = environment.from_string(template.read_text(encoding="utf-8"))
        return filled.render(
            report=report,
            images={
                name: {key: Markup(one) for key, one in image.items()}
                if isinstance(image, dict)
                else Markup(image)
                for name, image in images.items()
            },
            percent=verdict.percent,
            tone=lambda variant: figures.tone(variant, report["rope"]["variants"]),
            light=figures.LIGHT,
            dark=figures.DARK,
        )
    except (jinja2.TemplateError, OSError) as error:
        raise UserError(f"the template {template} cannot be filled ({error}); mend it") from error


def size(count: int) -> str:
    """Write bytes in the unit that suits them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"


if __name__ == "__main__":
    program(main)()
