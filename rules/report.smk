"""Write the report. In: the manifest of every stage. Out: an HTML page, and its figures as JSON and PNG."""

ROPES, MODELS, PHASES = (
    layout.reported_ropes(),
    layout.reported_models(),
    layout.reported_phases(),
)
PERPLEXITY, PASSKEY, HARNESS = map(
    layout.evaluations, ("perplexity", "passkey", "harness")
)


rule report:
    input:
        base=f"{RUN}/base.json",
        corpus=f"{RUN}/corpus.json",
        tokens=f"{RUN}/tokens.json",
        pack=f"{RUN}/pack.json",
        train=f"{RUN}/trained.json",
        merge=f"{RUN}/merged.json",
        models=options.manifests(MODELS),
        rope=options.manifests(ROPES),
        perplexity=options.manifests(PERPLEXITY),
        passkey=options.manifests(PASSKEY),
        harness=options.manifests(HARNESS),
        phases=options.manifests(PHASES),
        template=workflow_file("resources/report.html.jinja"),
    output:
        html=report(
            f"{RUN}/report.html", category="Report", caption="captions/report.rst"
        ),
        json=f"{RUN}/report.json",
        figures=report(
            directory(f"{RUN}/figures"),
            patterns=["{name}.png"],
            category="Figures",
            caption="captions/figures.rst",
        ),
    log:
        f"{RUN}/logs/report.log",
    benchmark:
        f"{RUN}/benchmarks/report.tsv"
    resources:
        mem_mb=request("report", "mem_mb"),
        runtime=request("report", "runtime"),
    params:
        code=code("report"),
        script=program("report"),
        models=options.named(MODELS),
        rope=options.named(ROPES),
        trained_rope=trained_rope(config),
        perplexity=options.named(PERPLEXITY),
        passkey=options.named(PASSKEY),
        harness=options.named(HARNESS),
        phases=options.named(PHASES),
        thresholds=as_json(config["gate"]),
        disclosure=config["model"]["disclosure"] or "",
        benchmarks=f"{RUN}/benchmarks",
    shell:
        "python {params.script:q} --base {input.base} --corpus {input.corpus}"
        " --tokens {input.tokens} --pack {input.pack} --train {input.train} --merge {input.merge}"
        " --models {params.models:q} --rope {params.rope:q} --trained-rope {params.trained_rope}"
        " --perplexity {params.perplexity:q} --passkey {params.passkey:q}"
        " --harness {params.harness:q} --phases {params.phases:q} --thresholds {params.thresholds}"
        " --disclosure={params.disclosure:q} --template {input.template:q}"
        " --benchmarks {params.benchmarks:q} --html {output.html} --json {output.json}"
        " --figures {output.figures} 2>&1 | tee {log}"
