"""Merge what was trained into the base. In: base, RoPE, adapter. Out: a plain model directory."""


rule merge:
    input:
        base=f"{RUN}/base.json",
        model=ancient(f"{RUN}/base"),
        rope=f"{RUN}/rope/{TRAINED_ROPE}.json",
        train=f"{RUN}/trained.json",
        adapter=ancient(f"{RUN}/trained"),
    output:
        manifest=f"{RUN}/merged.json",
        payload=directory(f"{RUN}/merged"),
    log:
        f"{RUN}/logs/merge.log",
    benchmark:
        f"{RUN}/benchmarks/merge.tsv"
    threads: config["training"]["threads"]
    resources:
        mem_mb=request("merge", "mem_mb"),
        runtime=request("merge", "runtime"),
    params:
        code=code("merge"),
        threads=config["training"]["threads"],
    shell:
        "python scripts/merge.py --base {input.base} --rope {input.rope} --train {input.train}"
        " --threads {params.threads} --manifest {output.manifest} --output {output.payload}"
        " 2>&1 | tee {log}"
