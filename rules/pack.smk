"""Mix long and short documents and pack them to full length. In: tokens, RoPE. Out: training sequences."""


rule pack:
    input:
        **results(tokens=f"{RUN}/tokens"),
        rope=lambda wildcards: f"{layout.rope(wildcards.phase)}.json",
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
        script=program("pack"),
        mix=of_phase(options.mix),
        # More steps use the same sequences, so a change must not pack again.
        to_read=unrecorded(
            lambda wildcards: options.tokens_to_read(layout, wildcards.phase)
        ),
    shell:
        "python {params.script:q} --tokens {input.tokens} --rope {input.rope}"
        " {params.mix} {params.to_read}"
        " --manifest {output.manifest} --output {output.payload} 2>&1 | tee {log}"
