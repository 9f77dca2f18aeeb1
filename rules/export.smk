"""Make the model directory to publish. In: merged model, its RoPE, report. Out: a directory with a model card, and
a manifest.

The export does not depend on the gate: the card says whether the run passed it. `push` needs the gate.
"""


rule export:
    input:
        **results(merge=f"{RUN}/merged"),
        rope=f"{layout.rope()}.json",
        report=f"{RUN}/report.json",
        template=workflow_file("resources/card.md.jinja"),
    output:
        manifest=f"{RUN}/export.json",
        payload=directory(f"{RUN}/export"),
    log:
        f"{RUN}/logs/export.log",
    benchmark:
        f"{RUN}/benchmarks/export.tsv"
    priority: 1  # before the gate, because a failed gate ends the run
    resources:
        mem_mb=request("export", "mem_mb"),
        runtime=request("export", "runtime"),
    params:
        code=code("export"),
        script=program("export"),
        settings=as_json(
            {key: config["export"][key] for key in ("name", "license", "language")}
        ),
        thresholds=as_json(config["gate"]),
    shell:
        "python {params.script:q} --merge {input.merge} --rope {input.rope}"
        " --report {input.report} --thresholds {params.thresholds} --settings {params.settings}"
        " --template {input.template:q} --manifest {output.manifest} --output {output.payload}"
        " 2>&1 | tee {log}"
