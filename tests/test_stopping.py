"""Stopping between two steps: by a signal, before the time limit, or for a newer attempt."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

import launch
from longyarn.core import attempts
from longyarn.core.errors import UserError
from longyarn.training import stopping

CPU = torch.device("cpu")


@pytest.fixture
def state():
    return SimpleNamespace(global_step=4, max_steps=10, is_world_process_zero=True)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A process group of one, an attempt, and the signal handlers as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGURG)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield attempts.claim(tmp_path / "work")
    torch.distributed.destroy_process_group()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def after_a_step(stop: stopping.Stopping, state) -> SimpleNamespace:
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    arguments = SimpleNamespace(device=CPU, output_dir=str(stop.attempt))
    stop.on_step_begin(arguments, state, control)
    stop.on_step_end(arguments, state, control)
    return control


def test_without_a_reason_training_goes_on(alone, state):
    stop = stopping.Stopping(alone, None)
    assert not after_a_step(stop, state).should_training_stop
    stop.end(CPU)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGURG])
def test_a_signal_saves_and_ends_with_try_again(alone, state, number, capsys):
    stop = stopping.Stopping(alone, None)
    os.kill(os.getpid(), number)
    control = after_a_step(stop, state)
    assert control.should_save and control.should_training_stop
    with pytest.raises(SystemExit) as exit_:
        stop.end(CPU)
    assert exit_.value.code == os.EX_TEMPFAIL
    assert f"stopped by {number.name} at step 4 of 10" in capsys.readouterr().err


def test_a_signal_after_the_last_step_changes_nothing(alone, state):
    stop = stopping.Stopping(alone, None)
    os.kill(os.getpid(), signal.SIGTERM)
    state.global_step = state.max_steps
    assert not after_a_step(stop, state).should_training_stop
    stop.end(CPU)


def test_the_lead_before_the_time_limit_follows_from_a_measured_save(alone, state):
    now = time.time()
    stop = stopping.Stopping(alone, now + 1000)
    assert stop.lead() == pytest.approx(100 + stopping.MARGIN, abs=1)
    assert not after_a_step(stop, state).should_training_stop
    stop.longest_save, stop.longest_step = 200.0, 30.0
    assert stop.lead() == 430.0 + stopping.MARGIN
    assert not after_a_step(stop, state).should_training_stop
    stop.longest_save = 480.0
    assert after_a_step(stop, state).should_training_stop


def test_a_save_is_timed_and_declared_whole(alone, state):
    stop = stopping.Stopping(alone, None)
    older = alone
    stop.attempt = attempts.claim(alone.parent)
    after_a_step(stop, state)
    checkpoint = stop.attempt / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "weights").write_bytes(b"123")
    time.sleep(0.05)
    stop.on_save(SimpleNamespace(output_dir=str(stop.attempt)), state, None)
    assert stop.longest_save >= 0.05
    assert attempts.is_whole(checkpoint)
    assert not older.exists()


def test_a_replaced_attempt_stops_in_one_sentence(alone, state):
    stop = stopping.Stopping(alone, None)
    attempts.claim(alone.parent)
    with pytest.raises(UserError, match="a newer attempt has taken over"):
        after_a_step(stop, state)
    with pytest.raises(UserError, match="a newer attempt has taken over"):
        stop.end(CPU)  # and it does not publish its weights


def test_the_deadline_is_slurm_s_own_or_reckoned_from_now(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    expected = time.time() + 600 - stopping.BEFORE_TRAINING
    assert stopping.deadline(10) == pytest.approx(expected, abs=5)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1234567890")
    assert stopping.deadline(10) == 1234567890


def test_the_meeting_point_is_the_machine_that_called_srun():
    environment = {
        "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "123456",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    }  # fmt: skip
    alone = ["--standalone", "--local-addr=127.0.0.1"]
    assert launch.meeting_point(1, {}) == alone
    # These variables may come from a shell on two machines, while the training runs on one.
    assert launch.meeting_point(1, environment) == alone
    assert launch.meeting_point(2, environment) == [
        "--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.7", "--master-port=23456"
    ]  # fmt: skip


def test_a_replaced_attempt_removes_nothing_that_its_successor_may_read(alone, state):
    first = alone
    second = stopping.Stopping(attempts.claim(first.parent), None)
    after_a_step(second, state)
    attempts.claim(first.parent)
    (second.attempt / "checkpoint-4").mkdir()
    second.on_save(SimpleNamespace(output_dir=str(second.attempt)), state, None)
    assert first.exists()
