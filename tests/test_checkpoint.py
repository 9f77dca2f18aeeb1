"""A checkpoint can be evaluated, even while the training still runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from stages import one_sentence

from longyarn.core import manifest

# Enough steps that training still runs when the evaluation is done.
LONG = {
    "mix": {"allow_repeats": True},
    "training": {"steps": 100000, "save_steps": 40, "held_out_steps": None},
}


def test_the_checkpoint_of_the_last_step_is_what_training_gave(finished_copy):
    finished_copy.snakemake("results/tests/step-4/merged.json", "results/tests/step-2/trained.json")
    run = finished_copy.directory / "results" / "tests"
    for part in ("trained", "merged"):
        whole, taken = (manifest.read(run / place / f"{part}.json") for place in ("", "step-4"))
        assert taken["files"] == whole["files"]
    earlier, later = (manifest.read(run / f"step-{step}" / "trained.json") for step in (2, 4))
    assert set(earlier["files"]) == set(later["files"])
    assert earlier["files"] != later["files"]
    assert earlier["facts"]["steps"] == 2


def test_a_checkpoint_that_is_not_there_is_one_sentence(finished_copy):
    done = finished_copy.snakemake("results/tests/step-3/trained.json", check=False)
    assert done.returncode == 1
    log = finished_copy.directory / "results/tests/logs/step-3/checkpoint.log"
    sentence = one_sentence(log.read_text())
    assert "no whole checkpoint of step 3" in sentence
    assert "it has those of 2, 4" in sentence


def test_a_run_that_has_not_come_to_its_training_is_left_alone(workspace):
    done = workspace.snakemake("results/tests/perplexity/step-2.json", check=False)
    assert done.returncode == 1
    sentence = one_sentence(done.stdout[done.stdout.rindex("error: ") :])
    assert "has not come so far: download_model would have to run first" in sentence
    assert not (workspace.directory / "results/tests/base.json").exists()


def test_a_checkpoint_is_evaluated_while_training_goes_on(finished_copy):
    run, work = (finished_copy.directory / part for part in ("results/tests", "work"))
    (finished_copy.directory / "long.yaml").write_text(json.dumps(LONG))
    layers = ["--configfile", "config.yaml", "tests/config.yaml", "long.yaml"]
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *layers, "--"]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    training = subprocess.Popen(
        [*command, "results/tests/trained.json"], cwd=finished_copy.directory, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        while not list(work.glob("*/attempt-*/checkpoint-40/whole.json")):
            assert training.poll() is None
            time.sleep(0.1)
        finished_copy.run(
            [*command[:-1], "--nolock", "--", "results/tests/perplexity/step-40.json"]
        )
        assert training.poll() is None
        assert not (run / "trained.json").exists()
    finally:
        os.killpg(training.pid, 9)
        training.wait()
    perplexity = {
        variant: manifest.read_facts(run / "perplexity" / f"{variant}.json")["lengths"]["1024"][
            "value"
        ]
        for variant in ("step-40", "yarn")
    }
    assert perplexity["step-40"] < perplexity["yarn"]  # it has learned something in 40 steps
