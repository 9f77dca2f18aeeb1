"""Compare the cells of a sweep: `snakemake sweep`. In: the trained model and its evaluation in each cell.
Out: a table and a figure.

A cell is the configuration with some values changed (config section `sweep`). Cells with equal RoPE settings
or training sequences share them: `Layout.holder` says where they lie. No other rule asks for a sweep.
"""


rule sweep:
    input:
        rope=f"{RUN}/rope/{trained_rope(config)}.json",
        train=expand(f"{RUN}/{{cell}}trained.json", cell=layout.cells),
        perplexity=expand(f"{RUN}/{{cell}}perplexity/trained.json", cell=layout.cells),
        passkey=expand(f"{RUN}/{{cell}}passkey/trained.json", cell=layout.cells),
    output:
        json=f"{RUN}/sweep.json",
        page=report(f"{RUN}/sweep.md", category="Sweep", caption="captions/sweep.rst"),
        png=report(f"{RUN}/sweep.png", category="Sweep", caption="captions/sweep.rst"),
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
        script=program("sweep"),
        cells=as_json(sweep_cells.all_changes(config)),
        benchmarks=f"{RUN}/benchmarks",
    shell:
        "python {params.script:q} --rope {input.rope} --cells {params.cells} --train {input.train:q}"
        " --perplexity {input.perplexity:q} --passkey {input.passkey:q} --benchmarks {params.benchmarks:q}"
        " --json {output.json} --page {output.page} --png {output.png} --svg {output.svg}"
        " 2>&1 | tee {log}"
