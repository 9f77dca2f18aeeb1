"""Seal the run. In: all that it is asked for. Out: its manifest and SHA256SUMS.

The configuration, the workflow and the record lie beside them and are no outputs: Snakemake deletes those of
a job that failed, and of the configuration there may be no other copy.
"""


rule provenance:
    input:
        layout.products(),
        manifests=[name for name in rules.report.input if name.endswith(".json")],
        report=f"{RUN}/report.json",
    output:
        manifest=f"{RUN}/provenance.json",
        seal=f"{RUN}/SHA256SUMS",
    log:
        f"{RUN}/logs/provenance.log",
    benchmark:
        f"{RUN}/benchmarks/provenance.tsv"
    retries: 0  # what does not match once does not match again
    resources:
        mem_mb=request("provenance", "mem_mb"),
        runtime=request("provenance", "runtime"),
    params:
        code=code("provenance"),
        script=program("provenance"),
        settings=as_json(config),
        images=IMAGE if IN_APPTAINER and "://" not in IMAGE else [],
    shell:
        "python {params.script:q} --seal {output.seal:q} --settings {params.settings}"
        " --images {params.images:q} 2>&1 | tee {log}"
