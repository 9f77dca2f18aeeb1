"""Prepare the run for training in LLaMA-Factory: `snakemake export_llamafactory`. In: base, RoPE, training sequences.
Out: a directory that LLaMA-Factory trains from (docs/interoperation.md).

No other rule asks for it. In a run with phases it prepares the last phase.
"""


rule export_llamafactory:
    input:
        unpack(start_of_phase),
        **results(pack=f"{RUN}/pack"),
    output:
        manifest=f"{RUN}/llamafactory.json",
        payload=directory(f"{RUN}/llamafactory"),
    log:
        f"{RUN}/logs/export_llamafactory.log",
    benchmark:
        f"{RUN}/benchmarks/export_llamafactory.tsv"
    resources:
        mem_mb=request("export_llamafactory", "mem_mb"),
        runtime=request("export_llamafactory", "runtime"),
    params:
        code=code("export_llamafactory"),
        script=program("export_llamafactory"),
        settings=options.training_settings(config),
    shell:
        "python {params.script:q} --base {input.base} --rope {input.rope}"
        " --pack {input.pack} --settings {params.settings} --manifest {output.manifest}"
        " --output {output.payload} 2>&1 | tee {log}"
