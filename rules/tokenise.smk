"""Turn documents into tokens and set the held-out ones apart. In: base, corpus. Out: tokens.

Finished parts lie in the work directory until all are done, so a job that was stopped continues there.
"""

CHAT_TEMPLATE = config["corpus"]["chat_template"]


rule tokenise:
    input:
        **results(base=f"{RUN}/base", corpus=f"{RUN}/corpus"),
        # an input, so that an edited template runs this stage again
        template=(
            str(from_here(chat_templates.path_of(CHAT_TEMPLATE)))
            if CHAT_TEMPLATE
            else []
        ),
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
        script=program("tokenise"),
        held_out=config["corpus"]["held_out"],
        held_out_documents=as_json(config["corpus"]["held_out_documents"]),
        template=unless_null("--chat-template", CHAT_TEMPLATE),
        work=config["paths"]["work"],
    shell:
        "python {params.script:q} --base {input.base} --corpus {input.corpus}"
        " --held-out {params.held_out:q} --held-out-documents {params.held_out_documents}"
        " {params.template} --workers {threads} --work {params.work:q}"
        " --manifest {output.manifest} --output {output.payload} 2>&1 | tee {log}"
