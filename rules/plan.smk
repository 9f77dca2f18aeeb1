"""Estimate what the run costs: `make plan`. In: only the configuration. Out: a table, or an error if it cannot fit.

No other rule asks for it. It needs Snakemake, which the image does not have.
"""


rule plan:
    log:
        f"{RUN}/logs/plan.log",
    localrule: True
    container:
        None if IN_APPTAINER else IMAGE
    params:
        script=program("plan"),
        settings=as_json(config),
    shell:
        "python {params.script:q} --settings {params.settings} 2>&1 | tee {log}"
