"""Compare the report with the thresholds in config section `gate`. In: report, merged model. Out: a manifest, or a
failure.

A run that misses a threshold fails. Its model stays, with NOT_VERIFIED.txt beside it. That file is not an
output, because Snakemake deletes the outputs of a failed job.
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
    retries: 0  # a second try would find the same
    localrule: True
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
