"""Seal the run. In: all that it is asked for. Out: its configuration, the workflow, the record, SHA256SUMS."""


rule provenance:
    input:
        PRODUCTS,
        manifests=[name for name in rules.report.input if name.endswith(".json")],
        report=f"{RUN}/report.json",
    output:
        manifest=f"{RUN}/provenance.json",
        config=f"{RUN}/config.yaml",
        crate=f"{RUN}/ro-crate-metadata.json",
        workflow=directory(f"{RUN}/workflow"),
        seal=f"{RUN}/SHA256SUMS",
    log:
        f"{RUN}/logs/provenance.log",
    benchmark:
        f"{RUN}/benchmarks/provenance.tsv"
    resources:
        mem_mb=request("provenance", "mem_mb"),
        runtime=request("provenance", "runtime"),
    params:
        code=code("provenance"),
        settings=as_json(config),
        images=IMAGE if IN_APPTAINER and "://" not in IMAGE else [],
    shell:
        "python scripts/provenance.py --seal {output.seal:q} --settings {params.settings}"
        " --images {params.images:q} 2>&1 | tee {log}"
