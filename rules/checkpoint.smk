"""Take what was trained by some step out of a checkpoint. In: what training takes. Out: as from training.

For a look at a run while it trains (docs/training.md): nothing else asks for it. The checkpoint itself
is no input, because it lies in the work directory and makes room for later ones.
"""


rule checkpoint:
    input:
        unpack(start_of_phase),
        pack=f"{RUN}/pack.json",
    output:
        manifest=f"{RUN}/step-{{step}}/trained.json",
        payload=directory(f"{RUN}/step-{{step}}/trained"),
    log:
        f"{RUN}/logs/step-{{step}}/checkpoint.log",
    benchmark:
        f"{RUN}/benchmarks/step-{{step}}/checkpoint.tsv"
    resources:
        # Not params: a setting that only watches must not delete what cannot be made anew.
        settings=lambda wildcards: as_json(training_of(wildcards)),
        mem_mb=request("checkpoint", "mem_mb"),
        runtime=request("checkpoint", "runtime"),
    params:
        code=code("checkpoint"),
        defining=lambda wildcards: as_json(engine.defining(training_of(wildcards))),
        work=config["paths"]["work"],
        trained=f"{RUN}/trained.json",
    shell:
        "python scripts/checkpoint.py --base {input.base} --rope {input.rope} --pack {input.pack}"
        " --settings {resources.settings} --work {params.work:q} --trained {params.trained}"
        " --step {wildcards.step} --manifest {output.manifest} --output {output.payload} 2>&1 | tee {log}"
