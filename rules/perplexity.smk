"""Measure the perplexity of one variant. In: its weights and RoPE, the held-out tokens. Out: perplexities."""


rule perplexity:
    input:
        unpack(variant_inputs),
        **results(tokens=f"{RUN}/tokens"),
    output:
        manifest=f"{RUN}/{{phase}}perplexity/{{variant}}.json",
    log:
        f"{RUN}/logs/{{phase}}perplexity.{{variant}}.log",
    benchmark:
        f"{RUN}/benchmarks/{{phase}}perplexity.{{variant}}.tsv"
    threads: config["evaluation"]["threads"]
    resources:
        **options.gpu_model(config),
        mem_mb=request("perplexity", "mem_mb"),
        runtime=request("perplexity", "runtime"),
        gpu=request("perplexity", "gpu"),
        nodes=1,  # else SLURM could spread several GPUs over several machines
    params:
        code=code("perplexity"),
        script=program("perplexity"),
        precision=config["evaluation"]["precision"],
        attention=config["evaluation"]["attention"],
        threads=config["evaluation"]["threads"],
        settings=as_json(config["evaluation"]["perplexity"]),
        lengths=options.derived_lengths(config, "perplexity"),
    shell:
        "python {params.script:q} --variant {wildcards.variant} --model {input.model}"
        " --base {input.base} --rope {input.rope} --precision {params.precision} --attention {params.attention}"
        " --threads {params.threads} --gpus {resources.gpu} --tokens {input.tokens}"
        " --settings {params.settings} {params.lengths} --manifest {output.manifest} 2>&1 | tee {log}"
