"""Longyarn: extend the context of a RoPE model, with the evidence that it works.

The stages, in order; each is rules/X.smk with scripts/X.py and targets a manifest:
download_model, download_corpus, patch_rope, tokenise, pack, train, merge, perplexity, passkey, report,
gate, export, provenance; push and bundle are targets of their own, and so are the exports to other
frameworks. Where the config names a model trained elsewhere, adopt takes the place of train.
"""

from snakemake.utils import min_version

min_version("9.27")


# The configuration of the micro model. A configuration of your own takes nothing from it.
if not workflow.overwrite_configfiles:

    configfile: workflow.source_path("config.yaml")


report: "rules/captions/workflow.rst"


include: "rules/common.smk"


container: IMAGE


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


# These run where Snakemake itself runs, so under SLURM on the login node: compute nodes often have no
# network, and the gate is not worth the queue. A container does not change that: a local rule runs in
# its image all the same.
localrules:
    all,
    prefetch,
    preflight,
    plan,
    download_model,
    download_variant,
    download_corpus,
    checkpoint,
    gate,
    push,


rule all:
    """The report, the model that it is about, the gate that it passed, and the seal on all of it."""
    default_target: True
    input:
        layout.products(),
        f"{RUN}/SHA256SUMS",


rule prefetch:
    """All that needs the network, images too; no stage after it does (docs/cluster.md)."""
    input:
        f"{RUN}/base.json",
        f"{RUN}/base",
        f"{RUN}/corpus.json",
        f"{RUN}/corpus",
        expand(f"{RUN}/models/{{name}}.json", name=layout.published),
        expand(f"{RUN}/models/{{name}}", name=layout.published),
        [f"{RUN}/trained.json", f"{RUN}/trained"] if FROM_ELSEWHERE else [],


rule preflight:
    """Check all that can be checked, line by line, and stop before the first job (docs/cluster.md)."""
    input:
        rules.all.input,


onstart:
    look_before_the_first_job()


onsuccess:
    print(layout.outcome(), file=sys.stderr)
