"""What the rules share: the checked configuration, the run's paths, and functions of a job's wildcards."""

import os
import sys
from pathlib import Path

# A dry run writes nothing, not even Python's caches.
DRY_RUN = workflow.output_settings.dryrun
sys.dont_write_bytecode |= DRY_RUN
sys.path.insert(0, str(Path(workflow.current_basedir).parent / "scripts"))

from longyarn.cluster import container_images, hardware, job_resources, preflight
from longyarn.cluster.preflight_run import of_workflow
from longyarn.config import sweep_cells, variants
from longyarn.config.load import complete
from longyarn.core import job_record
from longyarn.core.code_hash import code_hash
from longyarn.core.errors import UserError
from longyarn.core.files import ROOT, from_here
from longyarn.data import chat_templates, local_files
from longyarn.models.source_files import BASE_MODEL_FILES, EXTERNAL_MODEL_FILES
from longyarn.training import identity
from longyarn.workflow import incomplete, options
from longyarn.workflow.layout import (
    Layout,
    files_of,
    phase_name,
    trained_rope,
    workflow_file,
)
from longyarn.workflow.options import as_json, unless_null, unrecorded
from snakemake.settings.types import DeploymentMethod

IN_APPTAINER = (
    DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method
)
try:
    config = complete(config, ROOT / "schemas" / "config.schema.yaml")
    hardware.check(config)
    layout = Layout(config)
    if IN_APPTAINER:
        os.environ.update(container_images.environment(config, make=not DRY_RUN))
except UserError as error:
    # Snakemake itself would print a WorkflowError with a part of a traceback.
    sys.exit(f"error: {error}")

RUN = layout.run
IMAGE = container_images.resolve(config, ROOT)
FROM_ELSEWHERE = bool(config["training"]["source"])

# What a job records about its workflow and image. A Snakemake inside a job inherits these variables.
if not DRY_RUN and (workflow.is_main_process or job_record.COMMIT not in os.environ):
    os.environ.update(job_record.variables(ROOT, IMAGE if IN_APPTAINER else None))

PART = f"phase-[0-9]+/|{sweep_cells.DIRECTORY}/[^/]+/"


wildcard_constraints:
    variant="|".join(
        [*variants.BUILT_IN, "step-[0-9]+", *config["evaluation"]["more_variants"]]
    ),
    phase=f"({PART})?",
    step="[0-9]+",


def code(stage):
    """Return the hash of a stage's code: as a param it reruns the stage when the code changes.

    Comments, docstrings and layout do not count. docs/reruns.md says how to accept a change of code that
    changes no result.
    """
    return code_hash(ROOT / "scripts" / f"{stage}.py")


def program(stage):
    """Return the path of a stage's program as a param; wherever the workflow lies, the job is the same."""
    return unrecorded(workflow_file(f"scripts/{stage}.py"))


def request(stage, what):
    """Return a resource of a stage, mem_mb, runtime or gpu, as a function of the attempt."""
    return lambda wildcards, attempt: job_resources.request(
        layout.configuration(phase_name(wildcards)), stage, what, attempt
    )


def of_phase(function):
    """Return a param that is a function of the configuration of the job's phase or cell."""
    return lambda wildcards: function(layout.configuration(phase_name(wildcards)))


def results(**stems):
    """Return manifests and payloads as inputs; of a payload only the existence counts, not the time."""
    manifests = {name: f"{stem}.json" for name, stem in stems.items()}
    return manifests | {f"{name}_files": ancient(stem) for name, stem in stems.items()}


def start_of_phase(wildcards):
    """Return the inputs that tell what a phase starts from: a model and a RoPE."""
    phase = phase_name(wildcards)
    return results(base=layout.base(phase), rope=layout.rope(phase))


def variant_inputs(wildcards):
    """Return the inputs of an evaluation: a variant's weights and RoPE, and the base's manifest.

    The base's, because a variant with another tokenizer cannot be compared.
    """
    variant, phase = wildcards.variant, phase_name(wildcards)
    weights, rope = layout.weights_of(variant, phase), layout.rope_of(variant, phase)
    return {"base": f"{RUN}/base.json", **results(model=weights, rope=rope)}


def look_before_the_first_job():
    """Stop with a sentence if something is wrong that would otherwise show late, or in the queue."""
    if workflow.is_main_process and not workflow.touch:
        preflight.look(of_workflow(workflow, config))


if workflow.is_main_process:
    unfinished = incomplete.incomplete(Path(RUN))
    (incomplete.hide if DRY_RUN else incomplete.set_aside)(list(unfinished))
    for sentence in unfinished.values():
        print(f"{sentence}; the stage runs again where it is needed", file=sys.stderr)
