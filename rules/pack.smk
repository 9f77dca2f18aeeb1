"""Mix long and short, and pack to full length. In: tokens, RoPE. Out: training sequences."""


rule pack:
    input:
        tokens=f"{RUN}/tokens.json",
        token_files=ancient(f"{RUN}/tokens"),
        rope=f"{RUN}/rope/{TRAINED_ROPE}.json",
    output:
        manifest=f"{RUN}/pack.json",
        payload=directory(f"{RUN}/pack"),
    log:
        f"{RUN}/logs/pack.log",
    benchmark:
        f"{RUN}/benchmarks/pack.tsv"
    resources:
        mem_mb=request("pack", "mem_mb"),
        runtime=request("pack", "runtime"),
    params:
        code=code("pack"),
        long_share=config["mix"]["long_share"],
        budget=unless_null("--token-budget", config["mix"]["token_budget"]),
        masks=(
            "--document-masks"
            if config["mix"]["document_masks"]
            else "--no-document-masks"
        ),
        seed=config["mix"]["seed"],
    shell:
        "python scripts/pack.py --tokens {input.tokens} --rope {input.rope}"
        " --long-share {params.long_share} {params.budget} {params.masks} --seed {params.seed}"
        " --manifest {output.manifest} --output {output.payload} 2>&1 | tee {log}"
