"""What a run costs, before it is paid for: tokens, memory, disk, hours, and every request to SLURM.

All from the config; nothing is downloaded or submitted. A plan that cannot fit is refused, with what
would make it fit. docs/planning.md has the formulas.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import re
import tempfile
from collections import Counter
from pathlib import Path

from longyarn.cluster import estimate, job_resources, model_shapes
from longyarn.config import derived
from longyarn.config.checks import check, instruments
from longyarn.config.layers import layered
from longyarn.config.phases import phases
from longyarn.core.errors import UserError, first_line, program

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_PROFILE = Path("profiles/slurm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--configfile", type=Path, nargs="+", default=[], metavar="FILE",
        help="config files, later ones layered on earlier ones; default: config.yaml",
    )  # fmt: skip
    what.add_argument("--settings", type=json.loads, help="the whole configuration, as JSON")
    what.add_argument(
        "--document", action="store_true", help="print docs/requests.md: the default and presets/"
    )
    parser.add_argument(
        "--profile", type=Path, default=DEFAULT_PROFILE, help="Snakemake profile of the requests"
    )
    arguments = parser.parse_args()
    if arguments.document:
        print(document(arguments.profile), end="")
        return
    config = arguments.settings or planned(arguments.configfile)
    print(costs(config), flush=True)
    check_fit(config)
    print(f"\nRequests to SLURM at the first attempt, by {arguments.profile}")
    try:
        print(
            "\n".join(f"  {rule}: {call}" for rule, call in submissions(config, arguments.profile))
        )
    except ModuleNotFoundError as error:
        print(f"  not shown: {error.name} is not installed; run `make setup-slurm`")


def planned(files: list[Path]) -> dict:
    """Return the complete, checked configuration of these files; of config.yaml without any."""
    config = layered(*files)
    job_resources.check(config)
    return config


def shape_of(config: dict) -> model_shapes.Shape:
    """Return the model's shape, or refuse: without it nothing can be planned."""
    shape = model_shapes.find(config)
    if shape is None:
        raise UserError(
            f"the shape of {config['model']['source']} is unknown, so nothing can be planned; set "
            "model.shape to an architecture of resources/shapes.yaml, or bring the model first "
            "(`snakemake prefetch`)"
        )
    return shape


def costs(config: dict) -> str:
    """Return the table of tokens, memory, disk, arithmetic and hours."""
    shape = shape_of(config)
    setup = estimate.Setup.of(config)
    trained = shape.trained_parameters(setup.mode, setup.lora)
    lines = [
        f"Plan of {config['run']}: {config['model']['source']}",
        f"  parameters  {shape.parameters:,}, trained {trained:,} ({setup.mode})",
    ]
    for name, phase in phases(config).items():
        lines.append(f"  {name.strip('/') or 'tokens':12}{tokens_of(phase)}")
    lines.append(f"  hardware    {hardware(config)}")
    if not config["training"]["source"]:
        lines += ["", *memory(config, estimate.memory(shape, setup), setup.on_gpu)]
    lines.append("")
    lines.append("Disk, GB")
    written = written_to_disk(shape, config)
    lines += [f"  {name:20}{size / 1e9:9.2f}" for name, size in written.items()]
    lines.append(f"  {'all':20}{sum(written.values()) / 1e9:9.2f}")
    lines.append("")
    lines += hours(config, shape)
    return "\n".join(lines)


def memory(config: dict, parts: dict[str, float], on_gpu: bool) -> list[str]:
    """Return the lines on the memory of training, by part in bytes."""
    lines = [f"Memory of each {'GPU' if on_gpu else 'process'} in training, GiB"]
    lines += [f"  {name:20}{size / estimate.GIB:9.2f}" for name, size in parts.items() if size]
    room = f" of {job_resources.gpu(config)['gib']:g}" if on_gpu else ", and the libraries' 0.5"
    return [*lines, f"  {'most at once':20}{estimate.peak(parts) / estimate.GIB:9.2f}{room}"]


def tokens_of(config: dict) -> str:
    """Return the tokens that training reads, in words."""
    tokens, training = estimate.training_tokens(config), config["training"]
    if training["source"]:
        return f"none: {training['source']} was trained elsewhere"
    if tokens is None:
        return "as many as the corpus gives: state mix.token_budget to plan them"
    length = derived.sequence_length(config)
    steps = training["steps"] or tokens // length // training["batch_size"]
    return f"{tokens:,}: {steps} steps × {training['batch_size']} sequences × {length}"


def written_to_disk(shape: model_shapes.Shape, config: dict) -> Counter:
    """Return bytes on disk by part; each phase packs, trains and merges anew."""
    written = Counter(estimate.disk(shape, config))
    for name, phase in phases(config).items():
        if name:
            parts = estimate.disk(shape, phase)
            written.update({part: parts[part] for part in estimate.OF_EACH_PHASE})
    return written


def hardware(config: dict) -> str:
    """Return machines, GPUs and what of their peak is counted with."""
    training = config["training"]
    machines = f"{training['nodes']} machine{'s' * (training['nodes'] > 1)}"
    if not training["gpus"]:
        return (
            f"{machines} without GPU, {training['threads']} thread(s) at "
            f"{job_resources.CPU_RATE / 1e9:.0f} GFLOP/s, as in our default run on an AMD EPYC"
        )
    share = config["hardware"]["utilisation"]
    peak = job_resources.gpu(config)["tflops"][training["precision"]]
    return (
        f"{machines} × {training['gpus']} × {config['hardware']['gpu']}, at {share:.0%} of "
        f"{peak:g} TFLOP/s in {training['precision']}"
    )


def hours(config: dict, shape: model_shapes.Shape) -> list[str]:
    """Return the lines on arithmetic and hours."""
    lines = [f"{'Arithmetic and time':22}{'FLOP':>10}{'hours':>10}{'GPU-hours':>12}"]
    gpus, variants = config["training"]["gpus"], len(config["evaluation"]["variants"])
    for name, phase in phases(config).items():
        tokens = estimate.training_tokens(phase)
        if tokens is None:
            continue
        flops = estimate.training_flops(shape, estimate.Setup.of(phase), tokens)
        took = job_resources.training_hours(phase, shape)
        paid = took * derived.processes(phase["training"]) if gpus else 0
        lines.append(f"  {f'{name}train':20}{flops:10.1e}{took:10.2f}{paid:12.1f}")
    for instrument in instruments(config["evaluation"]):
        flops = estimate.evaluation_flops(shape, config, instrument) * variants
        took = job_resources.evaluation_hours(config, shape, instrument) * variants
        paid = took * job_resources.evaluation_gpus(config, shape)
        name = f"{instrument} × {variants}"
        lines.append(f"  {name:20}{flops:10.1e}{took:10.2f}{paid:12.1f}")
    return lines


def lacking(config: dict) -> float:
    """Return the GiB that training needs of each GPU beyond what that has; negative where it fits."""
    parts = estimate.memory(shape_of(config), estimate.Setup.of(config))
    return estimate.peak(parts) / estimate.GIB - job_resources.gpu(config)["gib"]


def check_fit(config: dict) -> None:
    """Refuse a plan whose training or evaluation is too large for its GPUs; say what would fit."""
    if not config["training"]["gpus"]:
        return
    name, size = config["hardware"]["gpu"], job_resources.gpu(config)["gib"]
    if lacking(config) > 0 and not config["training"]["source"]:
        parts = estimate.memory(shape_of(config), estimate.Setup.of(config))
        most = max(parts, key=parts.get)
        raise UserError(
            f"training needs {lacking(config) + size:.1f} GiB of each GPU, most of it for {most} "
            f"({parts[most] / estimate.GIB:.1f}), but hardware.gpu {name} has {size:g}; {advice(config)}"
        )
    for phase, settings in phases(config).items():
        if phase and lacking(settings) > 0:
            raise UserError(
                f"{phase.strip('/')} needs {lacking(settings) + size:.1f} GiB of each GPU, but "
                f"hardware.gpu {name} has {size:g}; give it settings that need less, as the run itself has"
            )
    count = job_resources.evaluation_gpus(config, shape_of(config))
    need = job_resources.evaluation_memory(config, shape_of(config), count) / estimate.GIB
    if need > size:
        raise UserError(
            f"evaluation needs {need:.1f} GiB of each of {count} GPUs, but hardware.gpu {name} has "
            f"{size:g}; shorten evaluation.*.lengths, or choose evaluation.precision bf16, "
            "evaluation.attention flash_attention_2 or a larger GPU"
        )


def advice(config: dict) -> str:
    """Return changes of the config with which training fits by the same estimate, the mildest first."""
    changed, changes = config, []
    for remedy in remedies(config):
        tried = apply(changed, [remedy])
        if tried and lacking(tried) < lacking(changed) - 0.05:
            changed, changes = tried, [*changes, remedy]
        if lacking(changed) <= 0:
            break
    else:
        return "nothing in the config makes it fit"
    for remedy in changes[:-1]:  # one that a later one has made superfluous is left out
        fewer = [other for other in changes if other is not remedy]
        without = apply(config, fewer)
        if without and lacking(without) <= 0:
            changed, changes = without, fewer
    stated = {key: value for remedy in changes for key, value in remedy.items()}
    words = ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in stated.items()
        if at(config, key) != value
    )
    fits = lacking(changed) + job_resources.gpu(changed)["gib"]
    return f"it would fit, in {fits:.1f} GiB, with {words}"


def remedies(config: dict) -> list[dict]:
    """Return changes to try, in order: those that leave the result alone, then machines, then the rest."""
    training, target = config["training"], config["rope"]["target_length"]
    found = [
        {"training.gradient_checkpointing": True},
        {"training.loss": "chunked"},
        {"training.micro_batch_size": 1},
    ]
    if "bf16" in job_resources.gpu(config)["tflops"]:
        # FlashAttention needs the same GPUs as bf16 does, and does not compute in fp32.
        kernels = [{"training.attention": "flash_attention_2"}, {"training.precision": "bf16"}]
        found += reversed(kernels) if training["precision"] == "fp32" else kernels
    found += [
        {"training.zero_stage": 3},
        {"training.gradient_checkpointing": True, "training.activation_offload": True},
        {"training.zero_stage": max(1, training["zero_stage"]), "training.offload": "optimizer"},
    ]
    found += [
        {"training.gpus": n, "training.zero_stage": 3} for n in (2, 4, 8) if n > training["gpus"]
    ]
    found += [
        {"training.nodes": n, "training.zero_stage": 3} for n in (2, 4, 8) if n > training["nodes"]
    ]
    heads = shape_of(config).num_attention_heads
    found += [
        {"training.sp_size": n, "training.zero_stage": 3} for n in (2, 4, 8) if heads % n == 0
    ]
    found.append({"training.offload": "all", "training.zero_stage": 3})
    larger = {
        entry["gib"]: name
        for name, entry in job_resources.known_gpus().items()
        if entry["gib"] > job_resources.gpu(config)["gib"]
        and training["precision"] in entry["tflops"]
    }
    found += [{"hardware.gpu": larger[size]} for size in sorted(larger)]
    found.append({"training.mode": "lora"})
    lengths = [target // 2**power for power in range(1, 8) if target // 2**power >= 512]
    return found + [shortened(config, length) for length in lengths]


def shortened(config: dict, target: int) -> dict:
    """Return the change to a shorter context: what is stated of a longer one goes with it."""
    changes = {"rope.target_length": target}
    if config["rope"]["factor"]:
        changes["rope.factor"] = None
    others = [f"perplexity.{protocol}" for protocol in ("truncate", "sliding")]
    for section in (*instruments(config["evaluation"]), *others):
        lengths = (at(config, f"evaluation.{section}") or {}).get("lengths") or []
        if lengths and max(lengths) > target:
            kept = [length for length in lengths if length < target]
            changes[f"evaluation.{section}.lengths"] = [*kept, target]
    return changes


def at(config: dict, key: str):
    """Return what a config has at a dotted key."""
    return functools.reduce(dict.__getitem__, key.split("."), config)


def apply(config: dict, changes: list[dict]) -> dict | None:
    """Return the config with dotted keys set, or None where no run would take it."""
    changed = copy.deepcopy(config)
    for key, value in (item for change in changes for item in change.items()):
        section, _, name = key.rpartition(".")
        at(changed, section)[name] = value
    try:
        check(changed)
        job_resources.check(changed)
    except UserError:
        return None
    return changed


def submissions(config: dict, profile: Path) -> list[tuple[str, str]]:
    """Return each rule and the sbatch command that the executor plugin would submit it with.

    Snakemake builds the DAG of the whole run, the profile's resources and overrides included, and the
    plugin writes the command. RUN, LOG and DIRECTORY stand for what differs from start to start.
    Local rules have none.
    """
    from snakemake_interface_common.exceptions import ApiError, WorkflowError
    from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

    settings = ExecutorPluginRegistry().get_plugin("slurm").get_settings(read_profile(profile))
    found = {}
    try:
        every, local = jobs(config, profile)
    except (WorkflowError, ApiError) as error:
        # It may be wrapped: names of errors, the reason, the wildcards.
        lines = str(error).partition("\nWildcards:")[0].splitlines()
        said = [line.strip() for line in lines if not line.endswith(":")]
        raise refused(profile, " ".join(said).rstrip(".")) from None
    count = Counter(map(job_resources.job_name, every))
    for job in every:
        name = job_resources.job_name(job)
        name = f"{name} × {count[name]}".removesuffix(" × 1")
        if job.rule.name in local:
            found[name] = "runs where Snakemake runs, on the login node"
            continue
        account, partition = (job.resources.get(f"slurm_{k}") for k in ("account", "partition"))
        call = job_resources.sbatch_call(
            job,
            settings,
            run_uuid="RUN",
            slurm_logfile="LOG",
            account=f"-A {account}" if account else "",
            partition=f"-p {partition}" if partition else "",
            workdir="DIRECTORY",
        )
        found[name] = re.sub(" +", " ", call)
    return list(found.items())


def document(profile: Path) -> str:
    """Return docs/requests.md: the requests of the default and of each preset."""
    text = [
        "# Requests to SLURM\n",
        "What each rule is submitted with at the first attempt, by `profiles/slurm` as it comes; a retry",
        "asks for 1.5 times the memory and time. `python scripts/plan.py --document > docs/requests.md`",
        "writes this file, and a test compares it. RUN, LOG and DIRECTORY differ from start to start; after",
        "them comes the command in `--wrap`. No preset has been run on a GPU by us.",
    ]
    for file in [None, *sorted((ROOT / "presets").glob("*.yaml"))]:
        title = f"presets/{file.name}" if file else "The default"
        text.append(f"\n## {title}\n\n| rule | request |\n| --- | --- |")
        rows = submissions(planned([file] if file else []), profile)
        text += [
            f"| {rule} | {f'`{call}`' if call.startswith('sbatch') else call} |"
            for rule, call in rows
        ]
    return "\n".join(text) + "\n"


def jobs(config: dict, profile: Path) -> tuple[list, set[str]]:
    """Return Snakemake's jobs of a whole run, in the order of the rules, and the local rules' names."""
    from snakemake import api
    from snakemake.settings.enums import Quietness

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        stated = read_profile(profile)
        with api.SnakemakeApi(api.OutputSettings(quiet={Quietness.ALL})) as snakemake:
            workflow = snakemake.workflow(
                api.ResourceSettings(
                    nodes=stated.jobs,
                    default_resources=stated.default_resources,
                    overwrite_resources=stated.set_resources,
                    overwrite_threads=stated.set_threads,
                ),
                config_settings=api.ConfigSettings(configfiles=[file]),
                snakefile=ROOT / "Snakefile",
            )
            dag = workflow.dag(api.DAGSettings(forceall=True))
            dag.execute_workflow(executor="slurm", pseudo_executor="dryrun")
            order = [rule.name for rule in workflow._workflow.rules]
            found = list(workflow._workflow.dag.jobs)
            local = set(workflow._workflow._localrules)
    found = [job for job in found if job.rule.name != "all"]
    return sorted(found, key=lambda job: (order.index(job.rule.name), str(job.wildcards))), local


def read_profile(profile: Path):
    """Return Snakemake's settings as a profile states them."""
    from snakemake import cli
    from snakemake.exceptions import CliException

    if not (profile / "config.yaml").is_file():
        raise UserError(f"{profile} has no config.yaml; mend --profile")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return cli.parse_args(["--workflow-profile", str(profile), "--dry-run"])[1]
    except SystemExit:
        raise refused(profile, said.getvalue().strip().splitlines()[-1].strip()) from None
    except (CliException, ValueError, TypeError) as error:  # such as `set-resources: text`
        raise refused(profile, first_line(error)) from None


def refused(profile: Path, reason: str) -> UserError:
    """Return the sentence on a profile that Snakemake does not take."""
    return UserError(
        f"{profile}/config.yaml is refused by Snakemake ({reason}); mend it as in {DEFAULT_PROFILE}"
    )


if __name__ == "__main__":
    program(main)()
