"""Measure the passkey retrieval of one variant. In: its weights and RoPE. Out: a grid of lengths and depths."""


rule passkey:
    input:
        unpack(variant_inputs),
        haystack=config["evaluation"]["passkey"]["haystack"] or [],
    output:
        manifest=f"{RUN}/{{phase}}passkey/{{variant}}.json",
    log:
        f"{RUN}/logs/{{phase}}passkey.{{variant}}.log",
    benchmark:
        f"{RUN}/benchmarks/{{phase}}passkey.{{variant}}.tsv"
    threads: config["evaluation"]["threads"]
    resources:
        **options.gpu_model(config),
        mem_mb=request("passkey", "mem_mb"),
        runtime=request("passkey", "runtime"),
        gpu=request("passkey", "gpu"),
        nodes=1,  # else SLURM could spread several GPUs over several machines
    params:
        code=code("passkey"),
        script=program("passkey"),
        precision=config["evaluation"]["precision"],
        attention=config["evaluation"]["attention"],
        threads=config["evaluation"]["threads"],
        lengths=options.lengths(config, "passkey"),
        depths=config["evaluation"]["passkey"]["depths"],
        trials=config["evaluation"]["passkey"]["trials"],
        digits=config["evaluation"]["passkey"]["digits"],
        seed=config["evaluation"]["passkey"]["seed"],
        needles=config["evaluation"]["passkey"]["needles"],
        haystack=unless_null("--haystack", config["evaluation"]["passkey"]["haystack"]),
    shell:
        "python {params.script:q} --variant {wildcards.variant} --model {input.model}"
        " --base {input.base} --rope {input.rope} --precision {params.precision} --attention {params.attention}"
        " --threads {params.threads} --gpus {resources.gpu} {params.lengths}"
        " --depths {params.depths} --trials {params.trials} --digits {params.digits} --seed {params.seed}"
        " --needles {params.needles} {params.haystack}"
        " --manifest {output.manifest} 2>&1 | tee {log}"
