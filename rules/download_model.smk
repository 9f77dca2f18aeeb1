"""Bring the base model. In: nothing, or a local directory. Out: its files, checked, and a manifest."""


rule download_model:
    input:
        local_model_files,
    output:
        manifest=f"{RUN}/base.json",
        payload=directory(f"{RUN}/base"),
    log:
        f"{RUN}/logs/download_model.log",
    benchmark:
        f"{RUN}/benchmarks/download_model.tsv"
    resources:
        mem_mb=request("download_model", "mem_mb"),
        runtime=request("download_model", "runtime"),
    params:
        code=code("download_model"),
        source=config["model"]["source"],
        revision=unless_null("--revision", config["model"]["revision"]),
        trust="--trust-remote-code" if config["model"]["trust_remote_code"] else "",
        cache=config["paths"]["cache"],
    shell:
        "python scripts/download_model.py --source {params.source:q} {params.revision} {params.trust}"
        " --cache {params.cache:q} --manifest {output.manifest} --output {output.payload}"
        " 2>&1 | tee {log}"
