"""Longyarn: extend the context of a RoPE model, with the evidence that it works.

The stages in order: download_model, download_corpus, patch_rope, tokenise, pack, train (or adopt, for a model
trained elsewhere), merge, perplexity, passkey, report, gate, export, provenance. Each is rules/X.smk with
scripts/X.py, and its target is a manifest. Push, bundle, sweep and other exports are targets of their own.
"""

from snakemake.utils import min_version

min_version("9.27")


# The micro model. A configuration of your own takes nothing from this file.
if not workflow.overwrite_configfiles:

    configfile: workflow.source_path("config.yaml")


include: "rules/common.smk"


container: IMAGE


report: "rules/captions/workflow.rst"


include: "rules/download_model.smk"
include: "rules/download_corpus.smk"
include: "rules/patch_rope.smk"
include: "rules/tokenise.smk"
include: "rules/pack.smk"


if FROM_ELSEWHERE:

    include: "rules/adopt.smk"

else:

    include: "rules/train.smk"


include: "rules/checkpoint.smk"
include: "rules/merge.smk"
include: "rules/perplexity.smk"
include: "rules/passkey.smk"
include: "rules/harness.smk"
include: "rules/report.smk"
include: "rules/gate.smk"
include: "rules/export.smk"
include: "rules/push.smk"
include: "rules/provenance.smk"
include: "rules/bundle.smk"
include: "rules/sweep.smk"
include: "rules/export_llamafactory.smk"
include: "rules/export_axolotl.smk"
include: "rules/plan.smk"


# These rules run no program, so Snakemake never submits them as jobs.
rule all:
    """The report, the model, the result of the gate, and the seal on all files."""
    default_target: True
    input:
        layout.products(),
        f"{RUN}/SHA256SUMS",


rule prefetch:
    """Everything that needs the network, images included; later stages need none (docs/cluster.md)."""
    input:
        layout.downloads(),


rule preflight:
    """Run every check, print one line for each, and start no job (docs/cluster.md)."""
    input:
        rules.all.input,


onstart:
    look_before_the_first_job()


onsuccess:
    print(layout.outcome(), file=sys.stderr)
