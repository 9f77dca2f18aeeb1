"""Download the corpus. In: nothing, or local files. Out: documents as JSON Lines in shards, and a manifest."""


rule download_corpus:
    input:
        [
            str(file)
            for entry in config["corpus"]["files"]
            for file in local_files.matches(entry["files"])
        ],
    output:
        manifest=f"{RUN}/corpus.json",
        payload=directory(f"{RUN}/corpus"),
    log:
        f"{RUN}/logs/download_corpus.log",
    benchmark:
        f"{RUN}/benchmarks/download_corpus.tsv"
    localrule: True
    resources:
        mem_mb=request("download_corpus", "mem_mb"),
        runtime=request("download_corpus", "runtime"),
    params:
        code=code("download_corpus"),
        script=program("download_corpus"),
        packages=as_json(config["corpus"]["packages"]),
        files=as_json(config["corpus"]["files"]),
        datasets=as_json(config["corpus"]["datasets"]),
        skip_bad="--skip-bad" if config["corpus"]["skip_bad"] else "",
        cache=config["paths"]["cache"],
    shell:
        "python {params.script:q} --packages {params.packages} --files {params.files}"
        " --datasets {params.datasets} {params.skip_bad} --cache {params.cache:q}"
        " --manifest {output.manifest} --output {output.payload} 2>&1 | tee {log}"
