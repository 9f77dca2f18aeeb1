"""Write the report: a page to read, and the same figures as JSON and PNG.

    R=results/micro
    python scripts/report.py --base $R/base.json --corpus $R/corpus.json --tokens $R/tokens.json \\
        --pack $R/pack.json --train $R/trained.json --merge $R/merged.json \\
        --rope base=$R/rope/base.json yarn=$R/rope/yarn.json --trained-rope yarn \\
        --perplexity base=$R/perplexity/base.json trained=$R/perplexity/trained.json \\
        --passkey base=$R/passkey/base.json trained=$R/passkey/trained.json \\
        --thresholds '{"perplexity_ratio": 1, "retention_ratio": 1.03, "passkey_rate": 0.9}' \\
        --template resources/report.html.jinja --benchmarks $R/benchmarks \\
        --html $R/report.html --json $R/report.json --figures $R/figures

Everything comes from the manifests. Nothing is measured and no model is loaded, so the report takes seconds
and can be made again at any time. docs/report.md describes every key of the JSON.
"""

import argparse
import json
from pathlib import Path

from longyarn.core import job_record, manifest
from longyarn.core.code_hash import code_hash
from longyarn.core.console import duration
from longyarn.core.errors import UserError, program
from longyarn.core.files import new_directory, read_json, sha256, write_json, write_text
from longyarn.core.lineage import parts
from longyarn.reporting import figures, style
from longyarn.reporting.assemble import assemble, timings
from longyarn.reporting.wording import between, percent, points, significant, size
from longyarn.stages import INSTRUMENTS, REPORTED


def main() -> None:
    arguments = read_arguments()
    paths = manifests_of_jobs(arguments)
    if f"patch_rope.{arguments.trained_rope}" not in paths:
        raise UserError(f"--rope lacks the trained variant {arguments.trained_rope!r}; add it")
    manifests = {job: read_stage(path, job) for job, path in paths.items()}
    hashes = {job: sha256(path) for job, path in paths.items()}
    report = assemble(
        manifests, hashes, arguments.trained_rope, arguments.thresholds, code_hash(Path(__file__))
    )
    report["model"]["disclosure"] = arguments.disclosure or None
    # If the model was trained elsewhere, a training time here is that of an earlier run.
    timed = [job for job in manifests if job != "train" or manifests[job]["stage"] == "train"]
    report["timings"] = timings(arguments.benchmarks, timed)
    with new_directory(arguments.figures) as directory:
        images = figures.write(report, directory)
    job_record.write_environment(arguments.json)
    write_json(arguments.json, report)
    write_text(arguments.html, page(arguments.template, report, images))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, stage in REPORTED.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"manifest of {stage}")
    parser.add_argument(
        "--models", type=named, nargs="*", default=[],
        help="variant=manifest of each variant that has its own weights",
    )  # fmt: skip
    parser.add_argument("--rope", type=named, nargs="+", required=True, help="variant=manifest")
    parser.add_argument("--trained-rope", required=True, help="variant that training started from")
    for name in INSTRUMENTS:
        parser.add_argument(f"--{name}", type=named, nargs="*", default=[], help="variant=manifest")
    parser.add_argument(
        "--phases", type=named, nargs="*", default=[],
        help="manifests of earlier phases, in order: phase-1/pack=manifest phase-1/train=manifest",
    )  # fmt: skip
    parser.add_argument(
        "--thresholds", type=json.loads, required=True, help="config section `gate`, as JSON"
    )
    parser.add_argument(
        "--disclosure", default="", help="what the base's training shares with the evaluation"
    )
    parser.add_argument("--template", type=Path, required=True, help="Jinja2 template of the page")
    parser.add_argument("--benchmarks", type=Path, required=True, help="directory of job timings")
    parser.add_argument("--html", type=Path, required=True, help="page to write")
    parser.add_argument("--json", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--figures", type=Path, required=True, help="directory of PNGs to write")
    return parser.parse_args()


def named(text: str) -> tuple[str, Path]:
    """Read a command-line argument of the form NAME=path."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=path")
    return name, Path(path)


def manifests_of_jobs(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return each job's manifest; a job is named as its log is, such as merge or passkey.base."""
    paths = {stage: getattr(arguments, name) for name, stage in REPORTED.items()}
    paths |= {f"{read_json(path)['stage']}.{variant}": path for variant, path in arguments.models}
    paths |= {f"patch_rope.{variant}": path for variant, path in arguments.rope}
    for stage in INSTRUMENTS:
        paths |= {f"{stage}.{variant}": path for variant, path in getattr(arguments, stage)}
    return paths | dict(arguments.phases)


def read_stage(path: Path, job: str) -> dict:
    """Read a manifest and check that it is this job's; adopt may take the place of train."""
    found = manifest.read(path)
    stage = parts(job)[1]
    if found["stage"] != stage and (stage, found["stage"]) != ("train", "adopt"):
        raise UserError(
            f"{path} is the manifest of {found['stage']!r}, not of {stage!r}; correct the command line"
        )
    return found


def page(template: Path, report: dict, images: dict) -> str:
    """Return the HTML page: the template filled with the report and its figures as inline SVG."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "figure": significant,
        "percent": lambda share: percent(share).replace(" ", "\N{NO-BREAK SPACE}"),
        "points": points,
        "plain": lambda value: f"{value:,.6g}",
        "range": lambda figure, write=significant: unbroken(
            between(figure["low"], figure["high"], write).replace(" to ", "–")
        ),
        "prose": unbroken,
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
            percent=percent,
            tone=lambda variant: style.tone(variant, report["rope"]["variants"]),
            light=style.LIGHT,
            dark=style.DARK,
        )
    except (jinja2.TemplateError, OSError) as error:
        raise UserError(f"the template {template} cannot be filled: {error}; correct it") from error


def unbroken(text: str) -> str:
    """Return a text in which no line can break between a number and its percent sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


if __name__ == "__main__":
    program(main)()
