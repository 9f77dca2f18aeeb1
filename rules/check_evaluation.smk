"""Refuse, before training, an evaluation that could not be done. In: base, tokens. Out: a manifest.

Training takes it as `ancient()`: it waits for the check, and does not run again because of it.
"""


rule check_evaluation:
    input:
        base=f"{RUN}/base.json",
        model=ancient(f"{RUN}/base"),
        tokens=f"{RUN}/tokens.json",
    output:
        manifest=f"{RUN}/evaluation.json",
    log:
        f"{RUN}/logs/check_evaluation.log",
    benchmark:
        f"{RUN}/benchmarks/check_evaluation.tsv"
    params:
        code=code("check_evaluation"),
        perplexity_lengths=config["evaluation"]["perplexity"]["lengths"],
        tokens=config["evaluation"]["perplexity"]["tokens_per_document"],
        passkey_lengths=config["evaluation"]["passkey"]["lengths"],
        digits=config["evaluation"]["passkey"]["digits"],
    shell:
        "python scripts/check_evaluation.py --base {input.base} --tokens {input.tokens}"
        " --perplexity-lengths {params.perplexity_lengths} --tokens-per-document {params.tokens}"
        " --passkey-lengths {params.passkey_lengths} --digits {params.digits}"
        " --manifest {output.manifest} 2>&1 | tee {log}"
