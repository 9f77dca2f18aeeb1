"""Continued pre-training. In: base, RoPE, training sequences. Out: the adapter, or all weights.

The job first refuses an evaluation that will not be possible, before it trains for hours. Checkpoints lie in a work
directory, whose name is the hash of what defines the run. They are not outputs, because Snakemake deletes
outputs before a job, and a job that was stopped resumes from its last checkpoint. On several machines the
rule has no container of its own, because the image has no srun: the rule calls srun, and Apptainer inside.
"""

NODES = config["training"]["nodes"]
GPUS = config["training"]["gpus"]
ENTERS_IMAGE_ITSELF = IN_APPTAINER and NODES > 1


rule train:
    input:
        unpack(start_of_phase),
        unpack(lambda wildcards: results(pack=layout.pack(wildcards.phase))),
        **results(tokens=f"{RUN}/tokens"),
    output:
        manifest=f"{RUN}/{{phase}}trained.json",
        payload=directory(f"{RUN}/{{phase}}trained"),
    log:
        lines=f"{RUN}/logs/{{phase}}train.log",
        metrics=f"{RUN}/logs/{{phase}}train.metrics.jsonl",
    benchmark:
        f"{RUN}/benchmarks/{{phase}}train.tsv"
    priority: 10  # the longest job: start it before the evaluations that can wait
    container:
        IMAGE if NODES == 1 else None
    threads: options.training_threads(config)
    resources:
        **options.training_nodes(config),
        **options.gpu_model(config),
        mem_mb=request("train", "mem_mb"),
        runtime=request("train", "runtime"),
        gpu=NODES * GPUS,
    params:
        code=code("train"),
        script=program("train"),
        check=program("check_evaluation"),
        launch=program("launch"),
        settings=of_phase(options.training_settings),
        image=IMAGE if ENTERS_IMAGE_ITSELF else "",  # `container:` records it otherwise
        nodes=NODES,
        processes=max(1, GPUS),
        work=config["paths"]["work"],
        evaluation=unrecorded(options.evaluation_checks(config)),
        utilisation=unrecorded(of_phase(job_resources.flops_options)),
        every_node=unrecorded(options.on_every_node(config)),
        inside_image=unrecorded(
            options.inside_image(IMAGE, workflow.deployment_settings)
            if ENTERS_IMAGE_ITSELF
            else ""
        ),
        # SLURM stops a job after its minutes. On a workstation they are only an estimate.
        limit=unrecorded("--minutes-are-a-limit" if workflow.remote_exec else ""),
    shell:
        # SIGTERM is for the training processes: they save and end, and all else ends after them.
        "trap '' TERM; ({params.inside_image} python {params.check:q} --base {input.base}"
        " --rope {input.rope} --tokens {input.tokens} {params.evaluation} && "
        "{params.every_node} {params.inside_image} python {params.launch:q}"
        " {params.nodes} --nproc-per-node {params.processes} {params.script:q}"
        " --base {input.base} --rope {input.rope} --pack {input.pack} --settings {params.settings}"
        " --tokens {input.tokens} --metrics {log.metrics} {params.utilisation}"
        " --work {params.work:q} --minutes {resources.runtime} {params.limit}"
        " --manifest {output.manifest} --output {output.payload}) 2>&1 | tee {log.lines}"
