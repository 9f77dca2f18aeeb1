"""Merge the trained weights into the base. In: base, RoPE, adapter. Out: a plain model directory."""


rule merge:
    input:
        unpack(start_of_phase),
        **results(train=f"{RUN}/{{phase}}trained"),
    output:
        manifest=f"{RUN}/{{phase}}merged.json",
        payload=directory(f"{RUN}/{{phase}}merged"),
    log:
        f"{RUN}/logs/{{phase}}merge.log",
    benchmark:
        f"{RUN}/benchmarks/{{phase}}merge.tsv"
    wildcard_constraints:
        phase=f"({PART}|step-[0-9]+/)?",
    threads: config["training"]["threads"]
    resources:
        mem_mb=request("merge", "mem_mb"),
        runtime=request("merge", "runtime"),
    params:
        code=code("merge"),
        script=program("merge"),
        threads=config["training"]["threads"],
        dtype=unless_null("--dtype", config["merge"]["dtype"]),
        work=config["paths"]["work"],
    shell:
        "python {params.script:q} --base {input.base} --rope {input.rope} --train {input.train}"
        " {params.dtype} --threads {params.threads} --work {params.work:q}"
        " --manifest {output.manifest} --output {output.payload}"
        " 2>&1 | tee {log}"
