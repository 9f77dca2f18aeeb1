"""Metrics: the lines are right, and after a crash the file is still one clean history."""

import json
import re
import time

import pytest
import torch
from stages import make_model
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from longyarn.core.console import duration
from longyarn.training import metrics
from longyarn.training.metrics import Metrics


def arguments_of(directory, **changes) -> TrainingArguments:
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(directory / "run"), **settings | changes)


def train(tmp_path, file, resume=None):
    """Train a tiny model for 6 steps with a line of metrics each, and return the Trainer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", vocab_size=64))
    ids = torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        model=model,
        args=arguments_of(tmp_path),
        train_dataset=[{"input_ids": row, "labels": row.clone()} for row in ids],
        callbacks=[Metrics(file, tokens_per_step=32)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_lines_say_what_the_trainer_logged(tmp_path, capsys):
    file = tmp_path / "logs" / "train.metrics.jsonl"
    history = [entry for entry in train(tmp_path, file).state.log_history if "loss" in entry]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, entry in zip(lines, history, strict=True):
        for key in ("step", "loss", "learning_rate", "grad_norm"):
            assert line[key] == entry[key]
        assert line["tokens"] == 32 * line["step"]
        assert "mfu" not in line
        assert 50e6 < line["memory_bytes"] < 64e9
    assert sorted(line["seconds"] for line in lines) == [line["seconds"] for line in lines]
    shown = re.findall(r"^train: step \d/6 loss .*$", capsys.readouterr().err, re.M)
    assert len(shown) == 6
    form = (
        r"train: step 6/6 loss \d+\.\d{4} \(learning rate \d\.\d\de-\d\d, grad norm \d+\.\d{3}, "
        r"\d+ tokens/s, \d+\.\d GiB, 0\.0 s left\)"
    )
    assert re.fullmatch(form, shown[-1])


def test_a_resumed_run_leaves_one_clean_history(tmp_path):
    """As if killed in step 6, after the checkpoint of step 4, while a line was being written."""
    file = tmp_path / "metrics.jsonl"
    train(tmp_path, file)
    whole = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(file.read_text()[:-40])
    train(tmp_path, file, resume=str(tmp_path / "run" / "checkpoint-4"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[:4] == whole[:4]
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole]
    assert lines[4]["seconds"] > whole[3]["seconds"]  # the clock continues from there
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def test_a_run_from_the_start_empties_the_file(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "held_out_8": 1.0}\n{"step": 3, "loss": 1.0}\nnot json\n7\n')
    assert metrics.keep_until(file, 2) == [{"step": 0, "held_out_8": 1.0}]
    assert file.read_text() == '{"step": 0, "held_out_8": 1.0}\n'


def begun(tmp_path, monkeypatch, *, step=0, first=True, device="cpu", **settings):
    """Return Metrics whose clock stands at 0, its file, and a function that logs at a second."""
    args = arguments_of(tmp_path)
    monkeypatch.setattr(TrainingArguments, "device", torch.device(device))
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    state = TrainerState(global_step=step, max_steps=100, is_world_process_zero=first)
    file = tmp_path / "metrics.jsonl"
    watch = Metrics(file, tokens_per_step=1000, **settings)
    watch.on_train_begin(args, state, TrainerControl())

    def log(second: float, step: int, **logs) -> None:
        now[0], state.global_step = second, step
        watch.on_log(args, state, TrainerControl(), logs=logs)

    return file, log


def test_the_rate_is_of_the_time_since_the_last_entry(tmp_path, monkeypatch, capsys):
    file, log = begun(tmp_path, monkeypatch, step=10)
    log(10.0, 20, loss=2.0)
    log(12.0, 30, loss=2.0)
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first["tokens_per_second"] == pytest.approx(1000)
    assert second["tokens_per_second"] == pytest.approx(5000)
    assert (first["tokens"], first["seconds"]) == (20_000, 10.0)
    # 20 steps took 12 s, so 70 more take 42 s, and 80 more from the first entry take 80 s.
    shown = capsys.readouterr().err.splitlines()
    assert shown[1].endswith(", 42 s left)") and shown[0].endswith(", 1 min 20 s left)")


def test_mfu_is_told_on_a_gpu_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    file, log = begun(tmp_path, monkeypatch, device="cuda", flops_per_token=4e9, peak_flops=1e13)
    log(1.0, 1, loss=2.0)
    line = json.loads(file.read_text())
    assert line["mfu"] == pytest.approx(0.4) and line["memory_bytes"] == 3 * 2**30
    assert ", 3.0 GiB, MFU 40.0%, " in capsys.readouterr().err


def test_held_out_losses_have_lines_of_their_own(tmp_path, monkeypatch):
    file, log = begun(tmp_path, monkeypatch)
    log(1.0, 2, held_out_512=3.0, held_out_4096=2.5, epoch=0.1)
    log(2.0, 2, train_runtime=3.0)
    assert json.loads(file.read_text()) == {"step": 2, "held_out_512": 3.0, "held_out_4096": 2.5}


def test_numbers_that_json_lacks_are_null(tmp_path, monkeypatch):
    """Under fp16 a step whose gradient overflows is skipped, and its norm is infinite."""
    file, log = begun(tmp_path, monkeypatch)
    log(1.0, 1, loss=2.0, grad_norm=float("inf"))
    assert "Infinity" not in file.read_text()
    assert json.loads(file.read_text())["grad_norm"] is None


def test_only_the_first_process_writes_and_without_a_file_none(tmp_path, monkeypatch, capsys):
    file, log = begun(tmp_path, monkeypatch, first=False)
    log(1.0, 1, loss=2.0)
    assert not file.exists() and "train:" not in capsys.readouterr().err

    watch = Metrics(None, tokens_per_step=1)
    state = TrainerState(max_steps=2)
    watch.on_train_begin(arguments_of(tmp_path), state, TrainerControl())
    state.global_step = 1
    monkeypatch.undo()
    watch.on_log(arguments_of(tmp_path), state, TrainerControl(), logs={"loss": 1.0})
    assert "train: step 1/2 loss 1.0000 (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (90061, "25 h 01 min"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words
