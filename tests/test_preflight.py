"""What is amiss is said before the first job: one sentence, nothing run, nothing submitted.

SLURM is a real one (tests/slurm). Programs of ours stand in only for NVIDIA's and for accounting,
which no test machine has.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, Workspace
from stages import MICRO_BASE, small_disk

from longyarn.cluster import preflight, preflight_local, preflight_run, preflight_slurm
from longyarn.config.load import complete
from longyarn.core.errors import UserError

REPEATED = {"allow_repeats": True}
ON_A_GPU = {"training": {"gpus": 1, "precision": "bf16"}}


def program(directory: Path, name: str, body: str, monkeypatch) -> None:
    """Put a shell program first on the path."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{body}\n")
    (directory / name).chmod(0o755)
    path = os.environ["PATH"]
    if str(directory) not in path:
        monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{path}")


def refusal(workspace: Workspace, done) -> str:
    """Return the one sentence with which a run stopped, after checking that nothing was run."""
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    assert done.stdout.count("error: ") == 1, done.stdout
    assert done.stdout.splitlines()[-1].startswith("error: "), done.stdout
    assert not list(workspace.directory.rglob("results/**/*.json"))
    assert not (workspace.directory / ".snakemake" / "locks").exists()
    return done.stdout.splitlines()[-1]


def outcomes(done) -> dict[str, str]:
    """Return what `snakemake preflight` printed, by the check's name."""
    names = "|".join(function.__name__ for function in preflight.CHECKS)
    return dict(re.findall(f"^({names}): (.*)$", done.stdout, re.M))


# On this machine, through Snakemake.


def test_results_that_no_archive_can_hold_are_said_first(workspace, tmp_path):
    overrides = {"paths": {"results": str(tmp_path / "results")}}
    done = workspace.snakemake("bundle", overrides=overrides, check=False)
    assert "paths.results leads out of it" in refusal(workspace, done)


def test_the_target_says_all_and_runs_nothing(workspace):
    done = workspace.snakemake("preflight")
    said = outcomes(done)
    assert list(said) == [
        "command", "image", "gpus", "disk", "hub", "elsewhere", "corpus", "destination", "archive",
        "lm_eval", "slurm", "walltime",
    ], done.stdout  # fmt: skip
    assert said.pop("command") == "ok: cores and rules"
    assert said.pop("disk").startswith("ok: ")
    assert said == {
        "image": "not checked: no job to come runs in a container (--sdm apptainer)",
        "gpus": "not checked: no job to come asks for a GPU of this machine",
        "hub": "not checked: model.source is a directory",
        "elsewhere": "not checked: no model trained elsewhere is to come",
        "corpus": "not checked: the corpus has no local files and no data sets of the hub",
        "destination": "not checked: nothing is to be pushed",
        "archive": "not checked: no archive is to be made",
        "lm_eval": "not checked: no task of lm_eval is to come",
        "slurm": "not checked: no job to come is submitted to SLURM",
        "walltime": "not checked: no job to come is submitted to SLURM",
    }
    assert not (workspace.directory / "results" / "tests" / "base.json").exists()


def test_a_run_without_a_driver(workspace, tmp_path, monkeypatch):
    program(tmp_path / "bin", "nvidia-smi", "echo 'No devices were found'; exit 6", monkeypatch)
    sentence = refusal(workspace, workspace.snakemake(overrides=ON_A_GPU, check=False))
    assert "training.gpus is 1, but `nvidia-smi -L` fails here (No devices were found)" in sentence
    assert "install NVIDIA's driver, or set training.gpus to 0" in sentence


def test_a_dry_run_and_a_target_without_gpus_do_not_mind(workspace, tmp_path, monkeypatch):
    program(tmp_path / "bin", "nvidia-smi", "exit 6", monkeypatch)
    workspace.snakemake("-n", overrides=ON_A_GPU)
    workspace.snakemake("prefetch", overrides=ON_A_GPU)


def test_several_machines_without_slurm(workspace):
    done = workspace.snakemake(overrides={"training": {"nodes": 2}}, check=False)
    assert "training.nodes is 2, but jobs are not submitted to SLURM" in refusal(workspace, done)


def test_a_full_disk(workspace, tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        overrides = {"paths": {"results": str(disk)}}
        done = workspace.snakemake(overrides=overrides, check=False)
        sentence = refusal(workspace, done)
        assert "the disk of paths.results has 0.00 GB free and about 0.0" in sentence
        assert "merged model 0.00 GB" in sentence
        assert "free some, or set a path on another disk" in sentence


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a/gated", "the hub gates a/gated: accept its terms"),
        ("no/model", "the hub does not have no/model, or it is private: correct model.source"),
        ("an/model", None),
    ],
)
def test_the_hub(hub, workspace, tmp_path, monkeypatch, source, expected):
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    gated = hub.model("a/gated", MICRO_BASE, gated=True)
    model = hub.model("an/model", MICRO_BASE)
    commit = (gated if source == "a/gated" else model).commit
    model = {"source": source, "revision": commit, "disclosure": None}
    overrides = {"model": model, "paths": {"cache": str(tmp_path / "cache")}}
    done = workspace.snakemake("preflight", overrides=overrides, check=False)
    if expected:
        assert done.returncode == 1
        assert f"error: {expected}" in done.stdout
        assert "Traceback" not in done.stdout
        return
    assert outcomes(done)["hub"] == f"ok: an/model at {commit}"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sentence = refusal(workspace, workspace.snakemake(overrides=overrides, check=False))
    assert f"the hub did not deliver an/model at {commit}" in sentence
    assert "offline" in sentence and "run `snakemake prefetch`" in sentence
    # What the cache has whole needs no network.
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    workspace.run([
        sys.executable, "scripts/download_model.py", "--source", "an/model", "--revision", commit,
        "--cache", tmp_path / "cache", "--manifest", "base.json", "--output", "base",
    ])  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = workspace.snakemake("preflight", overrides=overrides, check=False)
    assert outcomes(done)["hub"] == f"ok: an/model at {commit}, from the cache"


# Single checks.


def config_of(**sections: dict) -> dict:
    """Return the default configuration with changes in some sections."""
    config = complete(
        yaml.safe_load((ROOT / "config.yaml").read_text()), ROOT / "schemas" / "config.schema.yaml"
    )
    return config | {name: config[name] | changes for name, changes in sections.items()}


def a_run(**changes) -> preflight_run.Run:
    """A run of one job that asks for two GPUs."""
    job = SimpleNamespace(
        rule=SimpleNamespace(name="train"),
        params={},
        resources={"gpu": 2, "runtime": 60, "slurm_partition": "gpu"},
        is_local=True,
        container_img_path=None,
    )
    given = {
        "config": config_of(training={"gpus": 2}),
        "jobs": [job],
        "slurm": None,
        "settings": None,
        "retries": 0,
        "gpus": 2,
        "cores": 2,
        "unknown_rules": [],
    }
    return preflight_run.Run(**given | changes)


TWO_GPUS = (
    "echo 'GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0)'\n"
    "echo 'GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-1)'"
)


def test_gpus_in_the_image_for_the_cpu(tmp_path):
    job = a_run().jobs[0]
    job.container_img_path = tmp_path
    with pytest.raises(UserError, match=r"container\.image cpu cannot use GPUs, and"):
        preflight_local.image(a_run(jobs=[job]))


def test_a_task_that_lm_eval_does_not_have():
    pytest.importorskip("lm_eval", reason="needs `make setup-harness`")
    run = a_run(config=config_of(evaluation={"harness": {"tasks": ["helaswag"]}}))
    run.jobs[0].rule.name = "harness"
    with pytest.raises(
        UserError, match=r"evaluation\.harness\.tasks has 'helaswag', which lm_eval"
    ):
        preflight_local.lm_eval(run)
    run.jobs[0].container_img_path = "image.sif"
    with pytest.raises(preflight_run.NotChecked, match="the tasks run in the image"):
        preflight_local.lm_eval(run)


def test_lm_eval_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    run = a_run(config=config_of(evaluation={"harness": {"tasks": ["hellaswag"]}}))
    run.jobs[0].rule.name = "harness"
    with pytest.raises(UserError, match="which is not installed; run `make setup-harness`"):
        preflight_local.lm_eval(run)


def test_no_cores():
    with pytest.raises(UserError, match="--cores is 0"):
        preflight.command(a_run(cores=0))


def test_a_root_that_cannot_be_made(workspace):
    (workspace.directory / "file").write_text("")
    done = workspace.snakemake(overrides={"paths": {"work": "file/work"}}, check=False)
    assert "error: paths.work file/work cannot be made, because " in refusal(workspace, done)


def test_a_model_that_is_not_there(workspace):
    done = workspace.snakemake(overrides={"model": {"source": "/models/none"}}, check=False)
    sentence = refusal(workspace, done)
    assert "error: model.source /models/none is not a directory with a config.json" in sentence


def test_gpus_that_are_there(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program(tmp_path, "nvidia-smi", TWO_GPUS, monkeypatch)
    assert preflight_local.gpus(a_run()) == "2 × NVIDIA A100-SXM4-80GB"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(
        UserError, match=r"train asks for 2 GPUs.*shows 1 \(CUDA_VISIBLE_DEVICES is '1'"
    ):
        preflight_local.gpus(a_run())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="add --resources gpu=2"):
        preflight_local.gpus(a_run(gpus=None))
    # With --resources gpu=1 Snakemake lowers the request in silence; training starts two processes.
    lowered = a_run(gpus=1)
    lowered.jobs[0].resources["gpu"] = 1
    with pytest.raises(UserError, match="add --resources gpu=2"):
        preflight_local.gpus(lowered)


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs NVIDIA's driver")
def test_gpus_of_this_machine():
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    assert preflight_local.gpus(a_run(gpus=9)).startswith(f"{len(listed.splitlines())} × NVIDIA")


def test_an_image_that_is_missing(tmp_path):
    image = tmp_path / "image.sif"
    run = a_run(config=config_of(container={"image": str(image)}))
    run.jobs[0].container_img_path = str(image)
    with pytest.raises(UserError, match=r"image\.sif is missing; build it or fix the path"):
        preflight_local.image(run)
    image.touch()
    assert preflight_local.image(run) == str(image)


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        ("1:00:00", 60),
        ("30:00", 30),
        ("2-12:30:00", 3630),
        ("45", 0.75),
        ("infinite", math.inf),
        ("n/a", math.inf),
    ],
)
def test_slurms_way_to_write_a_time(limit, minutes):
    assert preflight_slurm.minutes_of(limit) == minutes


# With a real SLURM. Nothing is ever submitted.


@pytest.fixture
def on_slurm(cluster, workspace, monkeypatch):
    """Return a function that runs Snakemake with profiles/slurm, without images, and its output."""
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="needs envs/slurm.txt installed")
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])

    def run(*options: str, target: str = "all", **config: dict):
        before = cluster.jobs("--states=all")
        (workspace.directory / "slurm.yaml").write_text(json.dumps(config))
        done = workspace.run(
            [
                "timeout", "--signal=KILL", "100",
                sys.executable, "-m", "snakemake", "--workflow-profile", "profiles/slurm",
                "--software-deployment-method", "env-modules", *options,
                "--configfile", "config.yaml", "tests/config.yaml", "slurm.yaml", "--", target,
            ],
            check=False,
        )  # fmt: skip
        assert cluster.jobs("--states=all") == before
        return done

    return run


def test_slurm_accepts_the_chain(on_slurm):
    training = {"nodes": 2, "gpus": 2, "batch_size": 4}
    done = on_slurm(target="preflight", training=training)
    assert done.returncode == 0, done.stdout
    typed = on_slurm(
        target="preflight", training=training, hardware={"slurm_gpu_type": "pretended"}
    )
    assert outcomes(typed)["slurm"] == outcomes(done)["slurm"]
    other = on_slurm(target="preflight", training=training, hardware={"slurm_gpu_type": "h100"})
    assert "error: SLURM refuses the job of train" in other.stdout
    said = outcomes(done)
    # The downloads run on the login node and are not asked about.
    assert said["slurm"] == (
        "ok: accepts the requests of patch_rope, tokenise, pack, train, merge, perplexity, passkey, report, "
        "export, provenance"
    )
    assert said["gpus"] == "not checked: no job to come asks for a GPU of this machine"
    assert said["walltime"].startswith("ok: training needs about ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--default-resources", "slurm_partition=nowhere"],
            "(partition nowhere, ",
        ),
        (
            ["--set-resources", "train:mem_mb=600000"],
            "MB 600000, minutes ",
        ),
        (
            ["--set-resources", "merge:constraint=fast"],
            "Invalid feature specification; fix constraint in the profile",
        ),
        (
            ["--set-resources", "trian:mem_mb=2000"],
            "error: set-resources names trian, but no rule has that name; fix the profile",
        ),
        (
            ["--set-resources", "train:nodes=2"],
            "error: the profile sets nodes of train to 2, but training.nodes is 1; take it out",
        ),
        (
            ["--set-resources", "train:runtime=90000"],
            "error: train asks for 90000 minutes at attempt 1, but partition gpu gives ",
        ),
        (
            # It grows with each attempt, and the last would wait forever.
            ["--set-resources", "train:runtime=10000*attempt"],
            "error: train asks for 40000 minutes at attempt 4, but partition gpu gives ",
        ),
    ],
)
def test_slurm_refuses(on_slurm, workspace, options, expected):
    assert expected in refusal(workspace, on_slurm(*options))


def test_options_that_replace_what_several_machines_need(on_slurm, workspace):
    training = {"nodes": 2, "gpus": 2, "batch_size": 4}
    done = on_slurm("--set-resources", "train:slurm_extra='--exclusive'", training=training)
    assert "needs; add --gpus-per-node=2 to it" in refusal(workspace, done)


def test_of_several_partitions_one_that_fits_is_enough(on_slurm):
    longer = (
        "--default-resources",
        "slurm_partition=high,gpu",
        "--set-resources",
        "merge:runtime=70",
    )
    assert on_slurm(*longer, target="preflight").returncode == 0


def test_more_gpus_than_the_machines_have(on_slurm, workspace):
    done = on_slurm(training={"gpus": 5, "batch_size": 5}, mix={"token_budget": 32768})
    sentence = refusal(workspace, done)
    assert "SLURM refuses the job of train (" in sentence and "GPUs 5, " in sentence
    assert "training.gpus" in sentence


def test_training_that_cannot_end_in_its_attempts(on_slurm, workspace):
    done = on_slurm("--set-resources", "train:runtime=10", training={"steps": 20000}, mix=REPEATED)
    sentence = refusal(workspace, done)
    assert re.search("train needs about [0-9]+ minutes, but its attempts give 40;", sentence)
    assert "raise its `runtime` or `retries` in the profile" in sentence


def test_an_account_that_is_not_ours(on_slurm, workspace, tmp_path, monkeypatch):
    """The cluster keeps no accounting, so a program answers for it."""
    program(tmp_path / "bin", "sacctmgr", "echo physics", monkeypatch)
    done = on_slurm("--default-resources", "slurm_partition=gpu", "slurm_account=chemistry")
    sentence = refusal(workspace, done)
    assert "SLURM does not know slurm_account 'chemistry' of the profile" in sentence
    done = on_slurm(
        "--default-resources", "slurm_partition=gpu", "slurm_account=physics", target="preflight"
    )
    assert done.returncode == 0, done.stdout
