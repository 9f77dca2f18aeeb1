"""Take the weights of one step out of a training checkpoint. In: what training reads. Out: as from training.

For evaluating a run while it still trains (docs/training.md); no other rule asks for it. The checkpoint is
not an input, because it lies in the work directory, where later ones replace it.
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
        # Not params: a changed setting or code would delete an output that cannot be made again.
        settings=lambda wildcards: as_json(training_of(wildcards)),
        training_code=code("train"),
        mem_mb=request("checkpoint", "mem_mb"),
        runtime=request("checkpoint", "runtime"),
    params:
        code=code("checkpoint"),
        defining=lambda wildcards: as_json(
            identity.defining_settings(training_of(wildcards))
        ),
        work=config["paths"]["work"],
        trained=f"{RUN}/trained.json",
    shell:
        "python scripts/checkpoint.py --base {input.base} --rope {input.rope} --pack {input.pack}"
        " --settings {resources.settings} --code {resources.training_code} --work {params.work:q}"
        " --trained {params.trained} --step {wildcards.step} --manifest {output.manifest}"
        " --output {output.payload} 2>&1 | tee {log}"
