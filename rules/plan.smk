"""What the run would cost: `make plan`. In: the config alone. Out: a table, and an error if it cannot fit.

Not part of the chain: nothing else asks for it. It needs Snakemake, which the image does not have.
"""


rule plan:
    log:
        f"{RUN}/logs/plan.log",
    container:
        None if IN_APPTAINER else IMAGE
    params:
        settings=as_json(config),
    shell:
        "python {params.script:q} --settings {params.settings} 2>&1 | tee {log}"
