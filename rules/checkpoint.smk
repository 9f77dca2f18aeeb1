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
    localrule: True
    resources:
        mem_mb=request("checkpoint", "mem_mb"),
        runtime=request("checkpoint", "runtime"),
    params:
        code=code("checkpoint"),
        script=program("checkpoint"),
        defining=as_json(identity.defining_settings(options.training(config))),
        # If these changed, Snakemake would delete an output that cannot be made again.
        settings=unrecorded(options.training_settings(config)),
        training_code=unrecorded(code("train")),
        work=config["paths"]["work"],
        trained=f"{RUN}/trained.json",
    shell:
        "python {params.script:q} --base {input.base} --rope {input.rope} --pack {input.pack}"
        " --settings {params.settings} --code {params.training_code} --work {params.work:q}"
        " --trained {params.trained} --step {wildcards.step} --manifest {output.manifest}"
        " --output {output.payload} 2>&1 | tee {log}"
