"""The exported model to the hub. In: export, gate. Out: a manifest with the commit. A target of its own."""


rule push:
    input:
        export=f"{RUN}/export.json",
        model=ancient(f"{RUN}/export"),
        gate=f"{RUN}/verified.json",
    output:
        manifest=f"{RUN}/push.json",
    log:
        f"{RUN}/logs/push.log",
    benchmark:
        f"{RUN}/benchmarks/push.tsv"
    retries: 0  # who is refused once is refused again
    resources:
        mem_mb=request("push", "mem_mb"),
        runtime=request("push", "runtime"),
    params:
        code=code("push"),
        repository=config["export"]["repository"] or "",
        private="--private" if config["export"]["private"] else "",
    shell:
        "python scripts/push.py --export {input.export} --gate {input.gate}"
        " --repository={params.repository:q} {params.private} --manifest {output.manifest}"
        " 2>&1 | tee {log}"
