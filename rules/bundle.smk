"""Pack the run into one archive to pass on: `snakemake bundle`. In: the seal, and so every file that it lists.
Out: a tar file.

No other rule asks for it.
"""


rule bundle:
    input:
        seal=f"{RUN}/SHA256SUMS",
    output:
        archive=f"{RUN}.tar",
    log:
        f"{RUN}/logs/bundle.log",
    benchmark:
        f"{RUN}/benchmarks/bundle.tsv"
    resources:
        mem_mb=request("bundle", "mem_mb"),
        runtime=request("bundle", "runtime"),
    params:
        code=code("bundle"),
        script=program("bundle"),
    shell:
        "python {params.script:q} --seal {input.seal:q} --output {output.archive:q} 2>&1 | tee {log}"
