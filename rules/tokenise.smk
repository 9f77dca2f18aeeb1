"""Turn documents into tokens and keep the held-out ones apart. In: base, corpus. Out: tokens."""


rule tokenise:
    input:
        base=f"{RUN}/base.json",
        model=ancient(f"{RUN}/base"),
        corpus=f"{RUN}/corpus.json",
        documents=ancient(f"{RUN}/corpus"),
    output:
        manifest=f"{RUN}/tokens.json",
        payload=directory(f"{RUN}/tokens"),
    log:
        f"{RUN}/logs/tokenise.log",
    benchmark:
        f"{RUN}/benchmarks/tokenise.tsv"
    resources:
        mem_mb=request("tokenise", "mem_mb"),
        runtime=request("tokenise", "runtime"),
    params:
        code=code("tokenise"),
        held_out=config["corpus"]["held_out"],
    shell:
        "python scripts/tokenise.py --base {input.base} --corpus {input.corpus}"
        " --held-out {params.held_out:q} --manifest {output.manifest} --output {output.payload}"
        " 2>&1 | tee {log}"
