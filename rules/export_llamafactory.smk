"""Hand the run over to LLaMA-Factory: `snakemake export_llamafactory`. In: base, RoPE, training sequences.
Out: a directory that it trains from (docs/interoperation.md).

Nothing else asks for it. Of a run in phases it is the last phase.
"""


rule export_llamafactory:
    input:
        unpack(start_of_phase),
        pack=f"{RUN}/pack.json",
        sequences=ancient(f"{RUN}/pack"),
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
        settings=lambda wildcards: as_json(training_of(wildcards)),
    shell:
        "python scripts/export_llamafactory.py --base {input.base} --rope {input.rope}"
        " --pack {input.pack} --settings {params.settings} --manifest {output.manifest}"
        " --output {output.payload} 2>&1 | tee {log}"
