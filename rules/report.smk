"""The report. In: every stage's manifest. Out: a page to read, the same figures as JSON and PNG."""

# The base's frequencies are those before, the trained one's those after.
REPORTED_ROPES = sorted({"base", TRAINED_ROPE, *VARIANTS} - {"trained"})

# Variants with weights of their own: of another run, or published.
WITH_WEIGHTS = [*OTHER_RUNS, *PUBLISHED]

HARNESS_VARIANTS = VARIANTS if config["evaluation"]["harness"]["tasks"] else []

# What each earlier phase wrote, by the name of its job.
EARLIER = {
    f"{name}{stage}": f"{RUN}/{name}{written}.json"
    for name in list(PHASES)[:-1]
    for stage, written in {
        f"patch_rope.{rope_of(PHASES[name])}": f"rope/{rope_of(PHASES[name])}",
        "pack": "pack",
        "train": "trained",
        "merge": "merged",
    }.items()
}


rule report:
    input:
        base=f"{RUN}/base.json",
        corpus=f"{RUN}/corpus.json",
        tokens=f"{RUN}/tokens.json",
        pack=f"{RUN}/pack.json",
        train=f"{RUN}/trained.json",
        merge=f"{RUN}/merged.json",
        models=[f"{weights_of(name)}.json" for name in WITH_WEIGHTS],
        rope=[f"{rope_of_variant(name)}.json" for name in REPORTED_ROPES],
        perplexity=expand(f"{RUN}/perplexity/{{name}}.json", name=VARIANTS),
        passkey=expand(f"{RUN}/passkey/{{name}}.json", name=VARIANTS),
        harness=expand(f"{RUN}/harness/{{name}}.json", name=HARNESS_VARIANTS),
        phases=list(EARLIER.values()),
        template="resources/report.html.jinja",
    output:
        html=f"{RUN}/report.html",
        json=f"{RUN}/report.json",
        figures=directory(f"{RUN}/figures"),
    log:
        f"{RUN}/logs/report.log",
    benchmark:
        f"{RUN}/benchmarks/report.tsv"
    resources:
        mem_mb=request("report", "mem_mb"),
        runtime=request("report", "runtime"),
    params:
        code=code("report"),
        models=[f"{name}={weights_of(name)}.json" for name in WITH_WEIGHTS],
        rope=[f"{name}={rope_of_variant(name)}.json" for name in REPORTED_ROPES],
        trained_rope=TRAINED_ROPE,
        perplexity=by_name("perplexity", VARIANTS),
        passkey=by_name("passkey", VARIANTS),
        harness=by_name("harness", HARNESS_VARIANTS),
        phases=[f"{job}={written}" for job, written in EARLIER.items()],
        thresholds=as_json(config["gate"]),
        disclosure=config["model"]["disclosure"] or "",
        benchmarks=f"{RUN}/benchmarks",
    shell:
        "python scripts/report.py --base {input.base} --corpus {input.corpus}"
        " --tokens {input.tokens} --pack {input.pack} --train {input.train} --merge {input.merge}"
        " --models {params.models:q} --rope {params.rope:q} --trained-rope {params.trained_rope}"
        " --perplexity {params.perplexity:q} --passkey {params.passkey:q}"
        " --harness {params.harness:q} --phases {params.phases:q} --thresholds {params.thresholds}"
        " --disclosure={params.disclosure:q} --template {input.template}"
        " --benchmarks {params.benchmarks:q} --html {output.html} --json {output.json}"
        " --figures {output.figures} 2>&1 | tee {log}"
