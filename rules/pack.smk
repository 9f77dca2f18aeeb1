"""Mix long and short, and pack to full length. In: tokens, RoPE. Out: training sequences."""


def mix_options(wildcards):
    """Return the options of scripts/pack.py."""
    mix = phase_of(wildcards)["mix"]
    return " ".join(
        [
            unless_null("--sequence-length", mix["sequence_length"]),
            f"--long-share {mix['long_share']}",
            unless_null("--token-budget", mix["token_budget"]),
            "--document-masks" if mix["document_masks"] else "--no-document-masks",
            f"--seed {mix['seed']}",
        ]
    ).strip()


rule pack:
    input:
        tokens=f"{RUN}/tokens.json",
        token_files=ancient(f"{RUN}/tokens"),
        rope=lambda wildcards: f"{trained_rope(wildcards)}.json",
    output:
        manifest=f"{RUN}/{{phase}}pack.json",
        payload=directory(f"{RUN}/{{phase}}pack"),
    log:
        f"{RUN}/logs/{{phase}}pack.log",
    benchmark:
        f"{RUN}/benchmarks/{{phase}}pack.tsv"
    resources:
        mem_mb=request("pack", "mem_mb"),
        runtime=request("pack", "runtime"),
    params:
        code=code("pack"),
        mix=mix_options,
    shell:
        "python scripts/pack.py --tokens {input.tokens} --rope {input.rope}"
        " {params.mix}"
        " --manifest {output.manifest} --output {output.payload} 2>&1 | tee {log}"
