"""Download a model, or link a local one. In: nothing, or a local directory. Out: its checked files and a manifest.

The model is the base, or a published model to compare with (evaluation.more_variants).
"""


rule download_model:
    input:
        lambda wildcards: files_of(
            layout.source_of(wildcards.get("variant"))["source"], BASE_MODEL_FILES
        ),
    output:
        manifest=f"{RUN}/base.json",
        payload=directory(f"{RUN}/base"),
    log:
        f"{RUN}/logs/download_model.log",
    benchmark:
        f"{RUN}/benchmarks/download_model.tsv"
    localrule: True
    resources:
        mem_mb=request("download_model", "mem_mb"),
        runtime=request("download_model", "runtime"),
    params:
        code=code("download_model"),
        script=program("download_model"),
        source=lambda wildcards: layout.source_of(wildcards.get("variant"))["source"],
        revision=lambda wildcards: unless_null(
            "--revision", layout.source_of(wildcards.get("variant")).get("revision")
        ),
        trust="--trust-remote-code" if config["model"]["trust_remote_code"] else "",
        cache=config["paths"]["cache"],
    shell:
        "python {params.script:q} --source {params.source:q} {params.revision} {params.trust}"
        " --cache {params.cache:q} --manifest {output.manifest} --output {output.payload}"
        " 2>&1 | tee {log}"


use rule download_model as download_variant with:
    output:
        manifest=f"{RUN}/models/{{variant}}.json",
        payload=directory(f"{RUN}/models/{{variant}}"),
    log:
        f"{RUN}/logs/download_model.{{variant}}.log",
    benchmark:
        f"{RUN}/benchmarks/download_model.{{variant}}.tsv"
    localrule: True
