"""Mix long and short, and pack to full length. In: tokens, RoPE. Out: training sequences."""


def mix_options(wildcards):
    """Return the options of scripts/pack.py."""
    mix = phase_of(wildcards)["mix"]
    return " ".join(
        [
            unless_null("--sequence-length", mix["sequence_length"]),
            f"--long-share {mix['long_share']}",
            "" if mix["shares"] is None else f"--shares {as_json(mix['shares'])}",
            (
                ""
                if mix["short_from"] is None
                else shlex.join(["--short-from", *mix["short_from"]])
            ),
            f"--packing {mix['packing']}",
            unless_null("--token-budget", mix["token_budget"]),
            "--allow-repeats" if mix["allow_repeats"] else "",
            "--document-masks" if mix["document_masks"] else "--no-document-masks",
            f"--seed {mix['seed']}",
        ]
    ).strip()


def tokens_to_read(wildcards):
    """Return the option that tells how much training will read; none where it reads what is packed.

    A resource, not a param: with more steps, training goes on with the same sequences.
    """
    settings = phase_of(wildcards)
    if settings["training"]["steps"] is None:
        return ""
    return f"--read {estimate.training_tokens(settings)}"


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
        to_read=tokens_to_read,
    params:
        code=code("pack"),
        mix=mix_options,
    shell:
        "python scripts/pack.py --tokens {input.tokens} --rope {input.rope}"
        " {params.mix} {resources.to_read}"
        " --manifest {output.manifest} --output {output.payload} 2>&1 | tee {log}"
