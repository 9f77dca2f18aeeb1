"""The chain on a real SLURM: two nodes, and what happens when training is stopped in the middle.

Each way to stop ends, after at most a plain rerun, in the same weights as the run that nobody disturbed.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Workspace
from slurm.cluster import Cluster, wait_for

from longyarn.core import attempts, manifest

# Long enough to be stopped between two checkpoints.
TRAINING = {"nodes": 2, "steps": 12, "save_steps": 3, "batch_size": 4}
# As a user would, but without images (tests/test_containers.py has those), and at a test's pace.
COMMAND = [
    sys.executable, "-m", "snakemake", "--workflow-profile", "profiles/slurm",
    "--software-deployment-method", "env-modules", "--slurm-status-command", "squeue",
    "--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "5",
]  # fmt: skip
TRAINED = "results/tests/trained.json"
LIMIT = 900  # seconds, after which a run counts as hanging


class Run:
    """Snakemake submitting to the cluster from a working directory, in the background."""

    def __init__(
        self,
        directory: Path,
        cluster: Cluster,
        *arguments: str,
        config: dict | None = None,
        environment: dict | None = None,
    ):
        config = {"training": TRAINING, "mix": {"allow_repeats": True}} | (config or {})
        (directory / "slurm.yaml").write_text(json.dumps(config))
        self.log = directory / "run.log"
        environment = cluster.environment | (environment or {})
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        options = [a for a in arguments if a.startswith("-")]
        files = ["--configfile", "config.yaml", "tests/config.yaml", "slurm.yaml", "--"]
        targets = [a for a in arguments if not a.startswith("-")]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *options, *files, *targets],
                cwd=directory, env=environment, stdout=log, stderr=log,
            )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Wait for the end and return the exit code and what was printed; a hang fails the test."""
        try:
            code = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"Snakemake hangs:\n{self.log.read_text()[-4000:]}")
        return code, self.log.read_text()


@pytest.fixture(scope="module")
def chain(cluster, tmp_path_factory):
    """A working directory in which the whole chain ran on the cluster, undisturbed."""
    (ROOT / ".cache").mkdir(exist_ok=True)
    directory = tmp_path_factory.mktemp("chain")
    Workspace(directory)
    code, printed = Run(directory, cluster).end()
    assert code == 0, printed[-4000:]
    return directory


@pytest.fixture
def before_training(chain, tmp_path):
    """A copy of the finished run in which nothing was trained yet."""
    directory = tmp_path / "copy"
    shutil.copytree(chain, directory, symlinks=True)
    results = directory / "results" / "tests"
    (results / "trained.json").unlink()
    for made in (results / "trained", directory / "work"):
        shutil.rmtree(made)
    return directory


def work_of(directory: Path) -> Path:
    """Return the one work directory below a run's root of them."""
    (work,) = (directory / "work").iterdir()
    return work


def wait_for_checkpoint(directory: Path) -> None:
    """Wait until training has saved once."""
    wait_for(
        lambda: any((directory / "work").glob("*/attempt-*/checkpoint-*/whole.json")),
        120,
        "a checkpoint",
    )


def assert_same_weights(directory: Path, chain: Path) -> None:
    """Compare what was trained, file by file, with the undisturbed run."""
    ours, theirs = (manifest.read(place / TRAINED) for place in (directory, chain))
    assert ours["files"] == theirs["files"]


def training_log(directory: Path) -> str:
    return (directory / "results" / "tests" / "logs" / "train.log").read_text()


def test_the_whole_chain_on_two_nodes(chain, cluster):
    results = chain / "results" / "tests"
    assert (results / "report.html").is_file()
    facts = manifest.read(results / "trained.json")["facts"]
    assert facts["world_size"] == 2
    assert facts["steps"] == TRAINING["steps"]
    jobs = [job for job in cluster.jobs("--states=all") if job["directory"] == str(chain)]
    rules = {job["rule"].removeprefix("rule_").partition("_wildcards")[0] for job in jobs}
    # The downloads run on the login node, all else in jobs.
    assert rules == {
        "patch_rope", "tokenise", "pack", "train", "merge", "perplexity", "passkey", "report", "export",
        "provenance",
    }  # fmt: skip
    (training,) = (job for job in jobs if job["rule"] == "rule_train")
    assert training["nodes"] == "node[1-2]"
    assert not (chain / "work" / "final").exists()
    assert "NumTasks=2" in cluster.show(training["id"])


def test_a_cancelled_training_goes_on_after_a_plain_rerun(before_training, chain, cluster):
    run = Run(before_training, cluster, "--retries=0", TRAINED)
    wait_for_checkpoint(before_training)
    cluster.run("scancel", cluster.job("train")["id"])
    code, printed = run.end()
    assert code != 0, printed
    assert not (before_training / TRAINED).exists()
    code, printed = Run(before_training, cluster, TRAINED).end()
    assert code == 0, printed
    assert "resuming from attempt-0001/checkpoint-" in training_log(before_training)
    assert_same_weights(before_training, chain)


def test_a_requeued_training_goes_on(before_training, chain, cluster):
    run = Run(before_training, cluster, "--retries=0", TRAINED)
    wait_for_checkpoint(before_training)
    job = cluster.job("train")["id"]
    cluster.run("scontrol", "requeue", job)
    code, printed = run.end()
    assert code == 0, printed
    assert "Restarts=1" in cluster.show(job)
    assert "resuming from attempt-0001/checkpoint-" in training_log(before_training)
    assert_same_weights(before_training, chain)


def test_a_preempted_training_goes_on(before_training, chain, cluster):
    run = Run(before_training, cluster, "--retries=0", TRAINED)
    wait_for_checkpoint(before_training)
    job = cluster.job("train")["id"]
    cluster.run(
        "sbatch",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--wrap=sleep 3",
        "--output=/dev/null",
    )
    code, printed = run.end()
    assert code == 0, printed
    assert "Restarts=1" in cluster.show(job)
    assert "resuming from attempt-0001/checkpoint-" in training_log(before_training)
    assert_same_weights(before_training, chain)


def test_a_time_limit_is_met_with_a_checkpoint_in_time(before_training, chain, cluster):
    # As if stopped after step 9 of 12. One minute leaves no time for more than a step an attempt, so
    # this takes three attempts, however fast the machine is.
    shutil.copytree(chain / "work", before_training / "work")
    shutil.rmtree(next(work_of(before_training).glob("attempt-*/checkpoint-12")))
    code, printed = Run(before_training, cluster, "--set-resources=train:runtime=1", TRAINED).end()
    assert code == 0, printed
    logs = [p.read_text() for p in before_training.glob(".snakemake/slurm_logs/rule_train/*.log")]
    stops = [
        line for log in logs for line in log.splitlines() if "stopped by the time limit" in line
    ]
    assert len(stops) == 2, printed
    assert "resuming from attempt-0003/checkpoint-11" in training_log(before_training)
    assert_same_weights(before_training, chain)


def test_a_lost_node_leaves_one_writer(before_training, cluster, tmp_path):
    """The controller loses node1 and starts the job anew on node2, while the first still trains."""
    alone = TRAINING | {"nodes": 1, "steps": 24}
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(before_training, undisturbed, symlinks=True)
    code, printed = Run(undisturbed, cluster, TRAINED, config={"training": alone}).end()
    assert code == 0, printed
    run = Run(before_training, cluster, "--retries=0", TRAINED, config={"training": alone})
    wait_for_checkpoint(before_training)
    job = cluster.job("train")
    (orphan,) = processes(before_training, "train")
    # What SLURM does when it cannot reach a node goes on for as long as the node's processes live.
    os.kill(orphan, signal.SIGSTOP)
    cluster.kill_node(job["nodes"])
    try:
        wait_for(
            lambda: cluster.job("train")["nodes"] not in ("", job["nodes"]),
            120,
            "the job on the other node",
        )
        wait_for(lambda: attempts.newest(work_of(before_training)) == 2, 120, "the second attempt")
        os.kill(orphan, signal.SIGCONT)
        wait_for(lambda: not alive(orphan), 60, "the first attempt to give way")
        code, printed = run.end()
        assert code == 0, printed
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)
        cluster.start_node(job["nodes"])
        wait_for(cluster.nodes_idle, 60, "the node's return")
    assert_same_weights(before_training, undisturbed)


def test_jobs_in_images_stay_in_their_cgroup(cluster, chain, cpu_image, tmp_path):
    """A rule with a container, and training on two nodes, which enters the image by itself."""
    Workspace(tmp_path)
    config = {"container": {"image": cpu_image.address}}
    # SLURM's and the image's programs, whichever order: the two sets do not meet.
    environment = cpu_image.environment | {
        "PATH": f"{cpu_image.environment.get('PATH', '')}{os.pathsep}{cluster.environment['PATH']}"
    }
    options = ("--software-deployment-method=apptainer", TRAINED)
    run = Run(tmp_path, cluster, *options, config=config, environment=environment)
    for stage, count in (("tokenise", 1), ("train", 2)):
        wait_for(lambda: len(processes(tmp_path, stage)) == count, LIMIT, f"{stage} to run")  # noqa: B023
        job = cluster.job(stage)["id"]
        for process in processes(tmp_path, stage):
            assert not os.path.samefile(f"/proc/{process}/root", "/"), "not in an image"
            groups = Path(f"/proc/{process}/cgroup").read_text()
            assert re.search(rf"memory:/slurm_node[12]/uid_0/job_{job}/step", groups), groups
    code, printed = run.end()
    assert code == 0, printed
    assert_same_weights(tmp_path, chain)
    # Another image trains again, although the rule has no container of its own.
    other = {"container": {"image": cpu_image.address.rpartition(":")[0] + ":" + 64 * "0"}}
    for image, times in ((config, 0), (other, 1)):
        plan = Run(tmp_path, cluster, "-n", *options, config=image, environment=environment).end()[
            1
        ]
        assert len(re.findall(r"^rule train:", plan, re.M)) == times, plan


def processes(directory: Path, stage: str) -> list[int]:
    """Return the processes that run a stage's script in a directory, without what started them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            here = os.readlink(process / "cwd") == str(directory)
            # python, perhaps -u, and the script; the launcher has the script among its own arguments.
            if here and b"python" in words[0] and f"scripts/{stage}.py".encode() in words[1:3]:
                found.append(int(process.name))
    return found


def alive(process: int) -> bool:
    """Tell whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
