"""Mix long and short, and pack to full length. In: tokens, RoPE. Out: training sequences."""


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
