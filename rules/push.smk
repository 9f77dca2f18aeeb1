"""Push the exported model to the hub: `snakemake push`. In: export, gate. Out: a manifest with the commit.

No other rule asks for it.
"""


rule push:
    input:
        **results(export=f"{RUN}/export"),
        gate=f"{RUN}/verified.json",
    output:
        manifest=f"{RUN}/push.json",
    log:
        f"{RUN}/logs/push.log",
    benchmark:
        f"{RUN}/benchmarks/push.tsv"
    retries: 0  # a second try would be refused too
    localrule: True
    resources:
        mem_mb=request("push", "mem_mb"),
        runtime=request("push", "runtime"),
    params:
        code=code("push"),
        script=program("push"),
        repository=config["export"]["repository"] or "",
        private="--private" if config["export"]["private"] else "",
    shell:
        "python {params.script:q} --export {input.export} --gate {input.gate}"
        " --repository={params.repository:q} {params.private} --manifest {output.manifest}"
        " 2>&1 | tee {log}"
