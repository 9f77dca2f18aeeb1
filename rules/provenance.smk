"""Seal the run. In: everything that a run is asked for. Out: a manifest and SHA256SUMS.

The stage also writes the configuration, a copy of the workflow and the record of all jobs. They are not
outputs, because Snakemake deletes the outputs of a failed job, and there may be no other copy of them.
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
    retries: 0  # a file that does not match its manifest will not match later
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
