"""Compute and check the RoPE of one variant. In: a model. Out: the RoPE settings and a config.json."""


rule patch_rope:
    input:
        unpack(lambda wildcards: results(base=layout.weights_of(wildcards.variant))),
    output:
        manifest=f"{RUN}/{{phase}}rope/{{variant}}.json",
        payload=directory(f"{RUN}/{{phase}}rope/{{variant}}"),
    log:
        f"{RUN}/logs/{{phase}}patch_rope.{{variant}}.log",
    benchmark:
        f"{RUN}/benchmarks/{{phase}}patch_rope.{{variant}}.tsv"
    resources:
        mem_mb=request("patch_rope", "mem_mb"),
        runtime=request("patch_rope", "runtime"),
    params:
        code=code("patch_rope"),
        script=program("patch_rope"),
        settings=lambda wildcards: options.rope_settings(
            layout, wildcards.variant, wildcards.phase
        ),
    shell:
        "python {params.script:q} --base {input.base} --settings {params.settings}"
        " --manifest {output.manifest} --output {output.payload} 2>&1 | tee {log}"
