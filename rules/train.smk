"""Continued pre-training. In: base, RoPE, training sequences. Out: the adapter, or all weights.

The evaluation is checked first: one that could not be done is refused before hours are spent.
Checkpoints live in a work directory named by the hash of what defines the run, not among the
outputs, which Snakemake deletes before a job: a job that was stopped goes on from the last of them.
On several machines the rule has no container of its own, because srun is not in the image: it calls
srun, and apptainer inside.
"""


rule train:
    input:
        unpack(start_of_phase),
        pack=lambda wildcards: f"{pack_of(wildcards)}.json",
        sequences=lambda wildcards: ancient(pack_of(wildcards)),
        tokens=f"{RUN}/tokens.json",
        token_files=ancient(f"{RUN}/tokens"),
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
        TRAINING_IMAGE
    threads: TRAINING_THREADS
    resources:
        **TRAINING_PLACE,
        **GPU_TYPE,
        mem_mb=request("train", "mem_mb"),
        runtime=request("train", "runtime"),
        gpu=config["training"]["nodes"] * config["training"]["gpus"],
        # Not params, which are provenance: a changed evaluation must not train again, nor another way
        # to start the same program.
        evaluation=evaluation_lengths(),
        inside_image=inside_image(),
        on_every_node=on_every_node(),
        utilisation=lambda wildcards: job_resources.flops_options(phase_of(wildcards)),
        # In a job of SLURM the minutes are a limit; on a workstation they are a guess.
        time_limit="--minutes-are-a-limit" if workflow.remote_exec else "",
    params:
        code=code("train"),
        settings=lambda wildcards: as_json(training_of(wildcards)),
        # What `container:` does by itself: another image trains again.
        image=IMAGE if IN_APPTAINER and not TRAINING_IMAGE else "",
        nodes=NODES,
        processes=max(1, config["training"]["gpus"]),
        work=config["paths"]["work"],
    shell:
        # SIGTERM is for the training processes: they save and end, and all else ends after them.
        "trap '' TERM; ({resources.inside_image} python scripts/check_evaluation.py --base {input.base}"
        " --rope {input.rope} --tokens {input.tokens} {resources.evaluation} && "
        "{resources.on_every_node} {resources.inside_image} python scripts/launch.py"
        " {params.nodes} --nproc-per-node {params.processes} scripts/train.py"
        " --base {input.base} --rope {input.rope} --pack {input.pack} --settings {params.settings}"
        " --tokens {input.tokens} --metrics {log.metrics} {resources.utilisation}"
        " --work {params.work:q} --minutes {resources.runtime} {resources.time_limit}"
        " --manifest {output.manifest} --output {output.payload}) 2>&1 | tee {log.lines}"
