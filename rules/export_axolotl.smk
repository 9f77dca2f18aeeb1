"""Prepare the run for training in Axolotl: `snakemake export_axolotl`. In: base, RoPE, training sequences.
Out: a directory that Axolotl trains from (docs/interoperation.md).

No other rule asks for it. In a run with phases it prepares the last phase.
"""


rule export_axolotl:
    input:
        unpack(start_of_phase),
        **results(pack=f"{RUN}/pack"),
    output:
        manifest=f"{RUN}/axolotl.json",
        payload=directory(f"{RUN}/axolotl"),
    log:
        f"{RUN}/logs/export_axolotl.log",
    benchmark:
        f"{RUN}/benchmarks/export_axolotl.tsv"
    resources:
        mem_mb=request("export_axolotl", "mem_mb"),
        runtime=request("export_axolotl", "runtime"),
    params:
        code=code("export_axolotl"),
        script=program("export_axolotl"),
        settings=options.training_settings(config),
    shell:
        "python {params.script:q} --base {input.base} --rope {input.rope}"
        " --pack {input.pack} --settings {params.settings} --manifest {output.manifest}"
        " --output {output.payload} 2>&1 | tee {log}"
