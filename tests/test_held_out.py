"""Held-out losses: equal to losses computed by hand, over the same tokens, and without effect on training."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from stages import make_model, rope_facts
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.data.token_store import HELD_OUT, TRAINING, held_out_documents
from longyarn.rope.record import RopeRecord
from longyarn.training import held_out_loss
from longyarn.training.guards import Guards
from longyarn.training.held_out_loss import HeldOut
from longyarn.training.metrics import Metrics
from longyarn.training.trainer import Trainer

VOCABULARY = 64


@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(0)
    return make_model(tmp_path / "model", vocab_size=VOCABULARY)


def documents(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(VOCABULARY, size=n, dtype=np.int32) for n in lengths]


def by_hand(model, ids: np.ndarray, length: int, tile: int) -> list[float]:
    """Return the loss of each scored token, each from a forward pass over its context only."""
    found = []
    for at in range(len(ids)):
        begin = at // length * length
        if at % tile == 0:
            continue
        context = torch.tensor(ids[begin:at].astype(np.int64))[None]
        logits = model(input_ids=context).logits[0, -1].double()
        found.append(-float(logits.log_softmax(-1)[int(ids[at])]))
    return found


# Windows that divide the full length, that do not, and that leave a single token at the end.
@pytest.mark.parametrize("lengths", [(8, 24), (10, 24), (23, 24)])
def test_losses_equal_those_of_single_tokens(directory, lengths):
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    watch = HeldOut(documents(24, 23, 30), lengths, 1, None, log=dict)
    found = held_out_loss.losses(model, watch.documents, lengths, torch.device("cpu"))
    assert [len(ids) for ids in watch.documents] == [24, 24]  # the second is too short
    for length in lengths:
        with torch.no_grad():
            expected = [
                loss for ids in watch.documents for loss in by_hand(model, ids, length, lengths[0])
            ]
        assert len(expected) == 2 * (24 - -(-24 // lengths[0]))
        assert found[length] == pytest.approx(np.mean(expected), abs=1e-5)


def test_at_most_eight_documents_and_at_least_one():
    assert len(HeldOut(documents(*[32] * 9), (8, 32), 1, None, log=dict).documents) == 8
    with pytest.raises(UserError, match="no held-out document has 33 tokens"):
        HeldOut(documents(32, 5), (8, 33), 1, None, log=dict)


def test_no_random_number_is_drawn_and_modes_stay(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, attention_dropout=0.5).train()
    model.model.layers[0].eval()  # a mixed state must be restored
    before = {name: module.training for name, module in model.named_modules()}
    states = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())
    first, second = (
        held_out_loss.losses(model, documents(24), (8, 24), torch.device("cpu")) for _ in range(2)
    )
    assert first == second  # dropout was off
    assert before == {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    assert random.getstate() == states[0] and str(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(weight.grad is None for weight in model.parameters())


def trainer_of(directory, run, *, every=2, patience=None, watched=True, **changes) -> Trainer:
    """Return a Trainer of a model with dropout, measured on two documents."""
    model = AutoModelForCausalLM.from_pretrained(directory, attention_dropout=0.2)
    ids = torch.randint(VOCABULARY, (40, 16), generator=torch.Generator().manual_seed(0))
    settings = {
        "max_steps": 5,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 100,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    rotary = model.model.rotary_emb
    rope = RopeRecord.from_facts(rope_facts(inverse_frequencies=rotary.inv_freq.tolist()))
    trainer = Trainer(
        guards=Guards(rope, False),
        callbacks=[Metrics(run / "metrics.jsonl", tokens_per_step=32)],
        model=model,
        args=TrainingArguments(output_dir=str(run), **settings | changes),
        train_dataset=[{"input_ids": row, "labels": row.clone()} for row in ids],
    )
    if watched:
        watch = HeldOut(documents(32, 40), (8, 32), every, patience, log=trainer.log)
        trainer.add_callback(watch)
    return trainer


def measured(trainer) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if "held_out_32" in entry]


def test_measured_before_every_so_many_steps_and_at_the_end(directory, tmp_path, capsys):
    trainer = trainer_of(directory, tmp_path / "run")
    trainer.train()
    assert measured(trainer) == [0, 2, 4, 5]
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "held_out_8" in line] == [0, 2, 4, 5]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("train: held-out loss ") == 4
    # The last entry is of the last weights.
    own = [ids[:32] for ids in documents(32, 40)]
    twice = held_out_loss.losses(trainer.model, own, (8, 32), torch.device("cpu"))
    assert (lines[-2] | lines[-1])["held_out_32"] == pytest.approx(twice[32], abs=1e-6)


def test_measuring_changes_no_weight(directory, tmp_path):
    models = []
    for watched in (True, False):
        trainer = trainer_of(directory, tmp_path / str(watched), watched=watched)
        trainer.train()
        models.append(trainer.model)
    for weight, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(weight, other)


def scripted(monkeypatch, course: dict[int, float], trainer) -> None:
    """Make the measurement at each step return the loss that ``course`` has for it."""
    monkeypatch.setattr(
        held_out_loss,
        "losses",
        lambda *_: dict.fromkeys((8, 32), course[trainer.state.global_step]),
    )


# The best loss is at step 2. 2.999 is not 0.1 % below 3, so the losses of steps 3 to 5 have not fallen.
COURSE = {0: 4.0, 1: 3.5, 2: 3.0, 3: 3.1, 4: 2.999, 5: 3.2, 6: 2.0, 7: 1.0}


def test_stops_when_the_loss_falls_no_more(directory, tmp_path, monkeypatch, capsys):
    trainer = trainer_of(directory, tmp_path / "run", every=1, patience=3, max_steps=7)
    scripted(monkeypatch, COURSE, trainer)
    trainer.train()
    assert trainer.state.global_step == 5
    assert (tmp_path / "run" / "checkpoint-5").is_dir()
    assert capsys.readouterr().err.count("stopping early at step 5: the held-out loss at") == 1


def test_without_patience_it_never_stops(directory, tmp_path, monkeypatch):
    trainer = trainer_of(directory, tmp_path / "run", every=1, max_steps=7)
    scripted(monkeypatch, COURSE, trainer)
    trainer.train()
    assert trainer.state.global_step == 7


@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_resumed_run_stops_at_the_same_step(directory, tmp_path, monkeypatch, at):
    """Resumed before the stop, or at the stop, where no further step is trained."""
    run = tmp_path / "run"
    settings = {"every": 1, "patience": 3, "max_steps": 7, "save_steps": 1}
    first = trainer_of(directory, run, **settings)
    scripted(monkeypatch, COURSE, first)
    first.train()
    again = trainer_of(directory, run, **settings)
    scripted(monkeypatch, COURSE, again)
    again.train(resume_from_checkpoint=str(run / f"checkpoint-{at}"))
    assert again.state.global_step == first.state.global_step == 5
    assert measured(again) == measured(first) == [0, 1, 2, 3, 4, 5]
    for weight, other in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_a_stopped_run_measures_when_it_goes_on(directory, tmp_path):
    """After a signal only the checkpoint is written; the measurement follows on resuming."""
    run = tmp_path / "run"
    whole = trainer_of(directory, tmp_path / "whole")
    whole.train()
    stopped = trainer_of(directory, run)

    class Signal(type(stopped.callback_handler.callbacks[0])):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                control.should_training_stop = control.should_save = True

    stopped.callback_handler.callbacks.insert(1, Signal())
    stopped.train()
    assert measured(stopped) == [0]
    again = trainer_of(directory, run)
    again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert measured(again) == [0, 2, 4, 5]
    held = [
        [entry["held_out_32"] for entry in trainer.state.log_history if "held_out_32" in entry]
        for trainer in (whole, again)
    ]
    assert held[0] == held[1]


def test_reads_the_held_out_documents_alone(tmp_path):
    pieces = documents(5, 9, 4)
    (tmp_path / "tokens").mkdir()
    shard, index = (tmp_path / "tokens" / f"{name}.safetensors" for name in ("a", "index"))
    ids = {"ids": np.frombuffer(b"d0d1d2", np.uint8), "id_lengths": np.full(3, 2, np.int32)}
    save_file({"tokens": np.concatenate(pieces)} | ids, shard)
    save_file(
        {
            "lengths": np.asarray([5, 9, 4]),
            "roles": np.asarray([HELD_OUT, TRAINING, HELD_OUT], np.uint8),
            "collections": np.zeros(3, np.int32),
            "conversations": np.zeros(3, bool),
            "first_of_shard": np.zeros(1, np.int64),
        },
        index,
    )
    manifest.write(
        tmp_path / "tokens.json",
        script=manifest.__file__,
        settings={},
        inputs={},
        files=[shard, index],
        facts={"collection_names": ["d"], "dtype": "int32"},
    )
    found = held_out_documents(tmp_path / "tokens.json")
    assert list(found) == ["d0", "d2"]
    assert np.array_equal(found["d0"], pieces[0]) and np.array_equal(found["d2"], pieces[2])


def test_no_measurement_means_no_patience_spent():
    watch = HeldOut(documents(32), (8, 32), 5, 1, log=lambda entry: pytest.fail("measured"))
    control, state = TrainerControl(), TrainerState(global_step=3, max_steps=9)
    watch.on_step_end(None, state, control, model=None)
    assert not control.should_training_stop
