"""The sweep: `snakemake sweep`. In: what training and evaluation found in each cell. Out: table, figure.

A cell is the configuration with changes (config section `sweep`). What does not differ between cells is
computed once: `owner` in common.smk tells where it lies. Nothing else asks for it.
"""


rule sweep:
    input:
        rope=f"{RUN}/rope/{TRAINED_ROPE}.json",
        train=expand(f"{RUN}/{{cell}}trained.json", cell=CELLS),
        perplexity=expand(f"{RUN}/{{cell}}perplexity/trained.json", cell=CELLS),
        passkey=expand(f"{RUN}/{{cell}}passkey/trained.json", cell=CELLS),
    output:
        json=f"{RUN}/sweep.json",
        page=f"{RUN}/sweep.md",
        png=f"{RUN}/sweep.png",
        svg=f"{RUN}/sweep.svg",
    log:
        f"{RUN}/logs/sweep.log",
    benchmark:
        f"{RUN}/benchmarks/sweep.tsv"
    resources:
        mem_mb=request("sweep", "mem_mb"),
        runtime=request("sweep", "runtime"),
    params:
        code=code("sweep"),
        cells=as_json(sweep_cells.all_changes(config)),
        benchmarks=f"{RUN}/benchmarks",
    shell:
        "python scripts/sweep.py --rope {input.rope} --cells {params.cells} --train {input.train:q}"
        " --perplexity {input.perplexity:q} --passkey {input.passkey:q} --benchmarks {params.benchmarks:q}"
        " --json {output.json} --page {output.page} --png {output.png} --svg {output.svg}"
        " 2>&1 | tee {log}"
