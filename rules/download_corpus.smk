"""Bring the corpus. In: nothing. Out: documents as JSON Lines and a manifest."""


rule download_corpus:
    output:
        manifest=f"{RUN}/corpus.json",
        payload=directory(f"{RUN}/corpus"),
    log:
        f"{RUN}/logs/download_corpus.log",
    benchmark:
        f"{RUN}/benchmarks/download_corpus.tsv"
    resources:
        mem_mb=request("download_corpus", "mem_mb"),
        runtime=request("download_corpus", "runtime"),
    params:
        code=code("download_corpus"),
        packages=as_json(config["corpus"]["packages"]),
        cache=config["paths"]["cache"],
    shell:
        "python scripts/download_corpus.py --packages {params.packages} --cache {params.cache:q}"
        " --manifest {output.manifest} --output {output.payload} 2>&1 | tee {log}"
