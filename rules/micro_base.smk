"""Train the micro base model anew: `make micro-base`. In: the corpus. Out: a model directory.

Not part of the chain, which starts from the copy in resources/: nothing else asks for it.
"""


rule micro_base:
    input:
        corpus=f"{RUN}/corpus.json",
        documents=ancient(f"{RUN}/corpus"),
    output:
        model=directory(f"{RUN}/micro_base"),
    log:
        f"{RUN}/logs/micro_base.log",
    benchmark:
        f"{RUN}/benchmarks/micro_base.tsv"
    threads: 2
    resources:
        mem_mb=request("micro_base", "mem_mb"),
        runtime=request("micro_base", "runtime"),
    params:
        code=code("micro_base"),
        held_out=config["corpus"]["held_out"],
    shell:
        "python scripts/micro_base.py --corpus {input.corpus}"
        " --held-out {params.held_out:q} --output {output.model} --seed 0 --threads 2"
        " 2>&1 | tee {log}"
