"""Run tasks of lm_eval on one variant. In: its weights and RoPE. Out: the metrics of each task.

A run has no such job unless evaluation.harness.tasks names tasks.
"""


rule harness:
    input:
        unpack(variant_inputs),
    output:
        manifest=f"{RUN}/harness/{{variant}}.json",
    log:
        f"{RUN}/logs/harness.{{variant}}.log",
    benchmark:
        f"{RUN}/benchmarks/harness.{{variant}}.tsv"
    threads: config["evaluation"]["threads"]
    resources:
        **options.gpu_model(config),
        mem_mb=request("harness", "mem_mb"),
        runtime=request("harness", "runtime"),
        gpu=request("harness", "gpu"),
        nodes=1,  # else SLURM could spread several GPUs over several machines
    params:
        code=code("harness"),
        script=program("harness"),
        precision=config["evaluation"]["precision"],
        attention=config["evaluation"]["attention"],
        threads=config["evaluation"]["threads"],
        tasks=config["evaluation"]["harness"]["tasks"],
        lengths=options.lengths(config, "harness"),
        limit=unless_null("--limit", config["evaluation"]["harness"]["limit"]),
        num_fewshot=unless_null(
            "--num-fewshot", config["evaluation"]["harness"]["num_fewshot"]
        ),
    shell:
        "python {params.script:q} --variant {wildcards.variant} --model {input.model}"
        " --base {input.base} --rope {input.rope} --precision {params.precision} --attention {params.attention}"
        " --threads {params.threads} --gpus {resources.gpu} --tasks {params.tasks:q}"
        " {params.lengths} {params.limit} {params.num_fewshot}"
        " --manifest {output.manifest} 2>&1 | tee {log}"
