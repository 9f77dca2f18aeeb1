"""Turn documents into tokens and keep the held-out ones apart. In: base, corpus. Out: tokens.

Parts that are finished lie in the work directory until all are, so a job that was stopped goes on.
"""


rule tokenise:
    input:
        base=f"{RUN}/base.json",
        model=ancient(f"{RUN}/base"),
        corpus=f"{RUN}/corpus.json",
        documents=ancient(f"{RUN}/corpus"),
        template=chat_template_file(),
    output:
        manifest=f"{RUN}/tokens.json",
        payload=directory(f"{RUN}/tokens"),
    log:
        f"{RUN}/logs/tokenise.log",
    benchmark:
        f"{RUN}/benchmarks/tokenise.tsv"
    threads: job_resources.TOKENISE_WORKERS
    resources:
        mem_mb=request("tokenise", "mem_mb"),
        runtime=request("tokenise", "runtime"),
    params:
        code=code("tokenise"),
        held_out=config["corpus"]["held_out"],
        held_out_documents=as_json(config["corpus"]["held_out_documents"]),
        template=unless_null("--chat-template", config["corpus"]["chat_template"]),
        work=config["paths"]["work"],
    shell:
        "python scripts/tokenise.py --base {input.base} --corpus {input.corpus}"
        " --held-out {params.held_out:q} --held-out-documents {params.held_out_documents}"
        " {params.template} --workers {threads} --work {params.work:q}"
        " --manifest {output.manifest} --output {output.payload} 2>&1 | tee {log}"
