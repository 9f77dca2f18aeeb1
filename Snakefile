"""Longyarn: extend the context of a RoPE model, with the evidence that it works.

The stages, in order; each is rules/X.smk with scripts/X.py and targets a manifest:
download_model, download_corpus, patch_rope, tokenise, pack, train, merge, perplexity, passkey, report.
"""

from snakemake.utils import min_version

min_version("9.27")


configfile: "config.yaml"


include: "rules/common.smk"


container: config["container"]["image"]


include: "rules/download_model.smk"
include: "rules/download_corpus.smk"
include: "rules/patch_rope.smk"
include: "rules/tokenise.smk"
include: "rules/pack.smk"
include: "rules/train.smk"
include: "rules/merge.smk"
include: "rules/perplexity.smk"
include: "rules/passkey.smk"
include: "rules/report.smk"
include: "rules/micro_base.smk"


rule all:
    """The report, and the model that it is about."""
    default_target: True
    input:
        f"{RUN}/report.html",
        f"{RUN}/merged.json",
        f"{RUN}/merged",


onsuccess:
    print_verdict()
