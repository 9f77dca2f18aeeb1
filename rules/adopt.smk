"""Use a model that was trained elsewhere, in place of training. In: base, RoPE, training.source. Out: the
adapter, or all weights, as from training.

The Snakefile includes either this rule or train. The stage refuses a model with another RoPE, another base
or another tokenizer, because such faults raise no error later (docs/interoperation.md).
"""


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
    retries: 0  # a second try would be refused too
    localrule: True  # it may download from the hub
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
