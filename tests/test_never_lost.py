"""Training is never lost: after a kill, a signal or a full disk it resumes and ends in the same weights."""

import random
import signal
import subprocess
import time

import psutil
import pytest
from stages import one_sentence, small_disk
from training_runs import command, make_inputs, settings, train

from longyarn.core.files import sha256

STEPS = 10
DROPOUT = {"rank": 4, "dropout": 0.1}  # dropout makes the state of the random generators matter


def of_ten_steps(**changes) -> dict:
    return settings(**{"steps": STEPS, "save_steps": 2, "lora": DROPOUT} | changes)


def weights(output) -> str:
    return sha256(output / "trained" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> str:
    """The weights of a run without interruption."""
    output = tmp_path_factory.mktemp("undisturbed")
    train(inputs, output, of_ten_steps())
    return weights(output)


class Started:
    """A training run in the background."""

    def __init__(self, call: list[str]) -> None:
        self.process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
        self.seen: list[str] = []

    def until(self, words: str) -> None:
        """Wait for a line of the run."""
        for line in self.process.stderr:
            self.seen.append(line)
            if words in line:
                return
        raise AssertionError(f"{words!r} never came: {''.join(self.seen)[-2000:]}")

    def kill(self) -> None:
        """Kill every process of the run at once."""
        parent = psutil.Process(self.process.pid)
        for process in [parent, *parent.children(recursive=True)]:
            process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_step_a_run_ends_in_the_same_weights(inputs, undisturbed, tmp_path, seed):
    generator = random.Random(seed)
    training = of_ten_steps()
    # With the last seed, the resumed attempt is killed as well.
    for _ in range(2 if seed == 2 else 1):
        started = Started(command(inputs, tmp_path, training))
        started.until(f"train: step {generator.randint(5, STEPS - 1)}/")
        time.sleep(generator.uniform(0, 0.2))
        started.kill()
    done = train(inputs, tmp_path, training)
    assert "resuming from attempt-" in done.stderr
    assert weights(tmp_path) == undisturbed


def test_sigterm_saves_and_the_same_command_goes_on(inputs, undisturbed, tmp_path):
    training = of_ten_steps(save_steps=1000)
    started = Started(command(inputs, tmp_path, training))
    started.until("train: step 3/")
    started.process.send_signal(signal.SIGTERM)
    told = "".join([*started.seen, started.process.communicate()[1]])
    assert "stopped by SIGTERM" in told
    assert started.process.returncode == 75
    done = train(inputs, tmp_path, training)
    assert "resuming from attempt-0001/checkpoint-" in done.stderr
    assert weights(tmp_path) == undisturbed


def test_a_full_disk_loses_nothing_that_was_saved(inputs, undisturbed, tmp_path):
    training = of_ten_steps()
    with small_disk(tmp_path / "disk", 64) as disk:
        started = Started(command(inputs, tmp_path, training, work=disk))
        started.until("train: step 3/")
        filler = disk / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        told = started.process.communicate()[1]
        assert started.process.returncode == 1
        assert "no space left on the disk" in told
        assert "Traceback" not in told
        filler.unlink()
        done = train(inputs, tmp_path, training, work=disk)
    assert "resuming from attempt-" in done.stderr
    assert weights(tmp_path) == undisturbed


def test_killed_between_the_last_step_and_the_end(inputs, undisturbed, tmp_path):
    training = of_ten_steps()
    train(inputs, tmp_path, training)
    (tmp_path / "trained.json").unlink()
    (tmp_path / "trained" / "adapter_model.safetensors").unlink()
    done = train(inputs, tmp_path, training)
    assert f"resuming from attempt-0001/checkpoint-{STEPS}" in done.stderr
    assert weights(tmp_path) == undisturbed


def test_more_steps_extend_a_finished_run(inputs, undisturbed, tmp_path):
    train(inputs, tmp_path, of_ten_steps(steps=6))
    assert weights(tmp_path) != undisturbed
    done = train(inputs, tmp_path, of_ten_steps(save_steps=1, save_total_limit=3, logging_steps=2))
    assert "resuming from attempt-0001/checkpoint-6" in done.stderr
    assert weights(tmp_path) == undisturbed
    # Saving and logging follow the new settings, not those in the checkpoint.
    saved = (tmp_path / "work").glob("*/attempt-0002/checkpoint-*")
    assert sorted(path.name for path in saved) == ["checkpoint-10", "checkpoint-8", "checkpoint-9"]
    assert [line for line in done.stderr.splitlines() if "train: step 7/" in line] == []


def test_another_placement_is_refused_in_a_sentence(inputs, tmp_path):
    train(inputs, tmp_path, of_ten_steps(steps=2))
    done = train(inputs, tmp_path, of_ten_steps(nodes=2, zero_stage=3), check=False)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "holds step 2 of this run, trained with" in one_sentence(told[0])
    assert "training.nodes 1, training.zero_stage 2" in told[0]


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(inputs, undisturbed, tmp_path):
    training = of_ten_steps()
    train(inputs, tmp_path, training)
    last = next((tmp_path / "work").glob(f"*/attempt-0001/checkpoint-{STEPS}"))
    with open(last / "adapter_model.safetensors", "r+b") as file:
        file.truncate(100)
    done = train(inputs, tmp_path, training)
    assert f"warning: attempt-0001/checkpoint-{STEPS} is incomplete" in done.stderr
    assert f"resuming from attempt-0001/checkpoint-{STEPS - 2}" in done.stderr
    assert weights(tmp_path) == undisturbed
