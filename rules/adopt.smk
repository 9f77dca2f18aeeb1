"""Take a model that was trained elsewhere in place of training. In: base, RoPE, training.source. Out: as
from training: the adapter, or all weights.

The Snakefile includes this rule or that of training. It checks what would be wrong in silence: another
RoPE, another base, another tokenizer (docs/interoperation.md).
"""


# The hub can be needed, as for the base.
localrules:
    adopt,


rule adopt:
    input:
        unpack(start_of_phase),
        lambda wildcards: files_of(config["training"]["source"], EXTERNAL_MODEL_FILES),
    output:
        manifest=f"{RUN}/trained.json",
        payload=directory(f"{RUN}/trained"),
    log:
        f"{RUN}/logs/adopt.log",
    benchmark:
        f"{RUN}/benchmarks/adopt.tsv"
    retries: 0  # what is refused once is refused again
    resources:
        mem_mb=request("adopt", "mem_mb"),
        runtime=request("adopt", "runtime"),
    params:
        code=code("adopt"),
        script=program("adopt"),
        source=config["training"]["source"],
        revision=unless_null("--revision", config["training"]["revision"]),
        cache=config["paths"]["cache"],
    shell:
        "python {params.script:q} --base {input.base} --rope {input.rope} --source {params.source:q}"
        " {params.revision} --cache {params.cache:q} --manifest {output.manifest}"
        " --output {output.payload} 2>&1 | tee {log}"
