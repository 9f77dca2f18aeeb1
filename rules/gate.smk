"""The gate: compare with config section `gate`. In: report, merged model. Out: a manifest, or a failure.

A run that misses a threshold fails. The model stays where it is, and NOT_VERIFIED.txt stands beside it:
no output of the rule, because Snakemake deletes those of a job that failed.
"""


rule gate:
    input:
        report=f"{RUN}/report.json",
        merge=f"{RUN}/merged.json",
    output:
        manifest=f"{RUN}/verified.json",
    log:
        f"{RUN}/logs/gate.log",
    benchmark:
        f"{RUN}/benchmarks/gate.tsv"
    retries: 0  # it would find the same again
    resources:
        mem_mb=request("gate", "mem_mb"),
        runtime=request("gate", "runtime"),
    params:
        code=code("gate"),
        script=program("gate"),
        thresholds=as_json(config["gate"]),
        mark=f"{RUN}/NOT_VERIFIED.txt",
    shell:
        "python {params.script:q} --report {input.report} --merge {input.merge}"
        " --thresholds {params.thresholds} --mark {params.mark} --manifest {output.manifest}"
        " 2>&1 | tee {log}"
