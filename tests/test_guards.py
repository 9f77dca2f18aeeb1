"""The guards of training: a step that is not finite is never saved, and odd losses cause a warning."""

import json

import pytest
import torch
from stages import make_model, one_sentence, rope_facts
from transformers import AutoModelForCausalLM, TrainingArguments

from longyarn.core.errors import UserError
from longyarn.rope.record import RopeRecord
from longyarn.training import guards
from longyarn.training.guards import Guards
from longyarn.training.trainer import Trainer

STEPS = 4


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", vocab_size=64))


@pytest.fixture
def sequences():
    ids = torch.randint(64, (2 * STEPS, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def rope_of(model) -> RopeRecord:
    rotary = model.model.rotary_emb
    return RopeRecord.from_facts(rope_facts(inverse_frequencies=rotary.inv_freq.tolist()))


def trainer_of(model, sequences, tmp_path, *, callbacks=(), told=None, **changes) -> Trainer:
    watch = Guards(rope_of(model), False, **(told or {}))
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "logging_steps": 100,
        "logging_nan_inf_filter": False,
        "save_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), **settings | changes)
    return Trainer(
        guards=watch, callbacks=callbacks, model=model, args=arguments, train_dataset=sequences
    )


def saved(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))


def poison_gradient(model, call: int) -> None:
    """Make the gradient of one weight NaN in this backward pass, while the loss stays right."""
    calls = iter(range(1, 100))
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda grad: grad * float("nan") if next(calls) == call else grad)


def poison_loss(model, call: int) -> None:
    """Make the loss of one forward pass NaN."""
    calls = iter(range(1, 100))

    def poison(module, inputs, output):
        if next(calls) == call:
            output.loss = output.loss * float("nan")

    model.register_forward_hook(poison)


# Two micro-batches a step: the fifth is of step 3, and so is the sixth.
@pytest.mark.parametrize("call", [5, 6])
@pytest.mark.parametrize(("poison", "what"), [(poison_loss, "loss"), (poison_gradient, "gradient")])
def test_a_step_that_is_not_finite_stops_before_it_is_saved(
    model, sequences, tmp_path, poison, what, call
):
    asked = []
    told = {
        "documents": lambda step: asked.append(step) or [f"book/{n}" for n in range(7)],
        "last_good": lambda: saved(tmp_path)[-1],
    }
    trainer = trainer_of(model, sequences, tmp_path, told=told)
    poison(model, call)
    with pytest.raises(UserError) as stop:
        trainer.train()
    message = one_sentence(f"error: {stop.value}")
    assert f"the {what} is not finite at step 3 on book/0, book/1, book/2, book/3" in message
    assert "book/4 and 2 more documents;" in message and "book/5" not in message
    assert "last good checkpoint is checkpoint-2:" in message
    assert asked == [3]
    assert saved(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_a_weight_that_is_not_finite_stops_the_first_step(model, sequences, tmp_path):
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("inf")
    with pytest.raises(
        UserError,
        match=r"the loss is not finite at step 1; .* not saved, and there is no checkpoint",
    ):
        trainer_of(model, sequences, tmp_path).train()
    assert saved(tmp_path) == []


def test_a_sound_run_is_left_alone_and_ends_in_the_same_weights(model, sequences, tmp_path):
    import transformers

    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = trainer_of(model, sequences, tmp_path)
    trainer.train()
    plain = transformers.Trainer(model=twin, args=trainer.args, train_dataset=sequences)
    plain.train()
    assert len(saved(tmp_path)) == STEPS
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_a_run_resumed_at_its_end_trains_no_step_more(model, sequences, tmp_path):
    trainer_of(model, sequences * 2, tmp_path).train()
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    resumed = trainer_of(twin, sequences * 2, tmp_path)
    last = tmp_path / "run" / f"checkpoint-{STEPS}"
    before = (last / "trainer_state.json").stat().st_mtime_ns
    resumed.train(resume_from_checkpoint=str(last))
    assert resumed.state.global_step == STEPS
    assert (last / "trainer_state.json").stat().st_mtime_ns == before
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_gradients_that_overflow_fp16_count_only_at_the_lowest_scale(model, sequences, tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    trainer = trainer_of(model, sequences, tmp_path)
    assert trainer._gradient_is_bad(model, float("inf"))
    trainer.args.fp16 = True
    assert not trainer._gradient_is_bad(model, float("inf"))
    trainer.args.fp16 = False

    # DeepSpeed's own loss scaler, which raises an error when it cannot go lower.
    scaler = DynamicLossScaler(
        init_scale=1, scale_window=1, min_scale=1, delayed_shift=1,
        consecutive_hysteresis=False, raise_error_at_min_scale=True, dtype=torch.half,
    )  # fmt: skip
    model.register_forward_hook(lambda *_: scaler.update_scale(True))
    with pytest.raises(
        UserError, match=r"overflow fp16 at every scale by step 1; set training\.prec"
    ):
        trainer.train()


def test_weights_tell_where_the_engine_tells_no_norm(model, sequences, tmp_path):
    trainer = trainer_of(model, sequences, tmp_path)
    assert not trainer._gradient_is_bad(model, None)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    assert trainer._gradient_is_bad(model, None)


def check_in_one_of_two(rank: int, directory: str, bad: int) -> None:
    """Run as process ``rank``, where only ``bad`` sees a loss that is not finite; write what it raises."""
    from pathlib import Path

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2
    )
    watch = Guards({}, False, documents=lambda step: ["a"])
    told = []
    for step in (1, 2):
        watch.saw_loss(torch.tensor(float("nan") if step == 2 and rank == bad else 1.0))
        try:
            watch.check_step(step, False, torch.device("cpu"))
        except UserError as error:
            told.append(str(error))
    (Path(directory) / f"{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def test_all_processes_stop_when_one_sees_it(tmp_path):
    torch.multiprocessing.spawn(check_in_one_of_two, (str(tmp_path), 1), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first) == 1 and first[0].startswith("the loss is not finite at step 2 on a;")


def test_a_spike_stands_out_of_the_noise():
    quiet = [2.0, 2.02, 1.98, 2.01, 1.99]
    assert guards.spike([*quiet, 2.41]) == pytest.approx(2.0)  # above 20 %, far above 6 sigma
    assert guards.spike([*quiet, 2.39]) is None  # far above 6 sigma, below 20 %
    noisy = [2.0, 3.0, 1.0, 2.5, 1.5]  # sigma 0.71
    assert guards.spike([*noisy, 6.0]) is None
    assert guards.spike([*noisy, 6.5]) == pytest.approx(2.0)
    assert guards.spike([*quiet[:4], 9.0]) is None  # too few to compare with
    assert guards.spike([50.0, *quiet * 10, 2.5]) == pytest.approx(2.0)  # the first is too long ago


def test_divergence_compares_the_ends():
    assert guards.diverges([2.0] * 10 + [2.3] * 10)
    assert not guards.diverges([2.0] * 10 + [2.1] * 10)
    assert not guards.diverges([2.0] * 9 + [9.0] * 10)  # too few to compare


def test_warnings_are_printed_once_and_stop_nothing(model, sequences, tmp_path, capsys):
    from transformers import TrainerControl, TrainerState

    trainer = trainer_of(model, sequences, tmp_path, warmup_steps=2)
    state = TrainerState(max_steps=100)
    control = TrainerControl()
    course = [3.0, 2.5] + [2.0] * 8 + [4.5] + [2.0] * 11 + [2.6] * 20
    for step, loss in enumerate(course, start=1):
        state.global_step = step
        state.log_history.append({"loss": loss, "step": step})
        trainer.guards.on_log(trainer.args, state, control, logs={"loss": loss})
    told = capsys.readouterr().err
    assert told.count("warning") == 2
    assert "the loss jumped to 4.5000 at step 11 from an average of 2.1500" in told
    assert (
        "the loss is rising: it averages 2.4800 at step 30 and averaged 2.2500 after the warm-up"
        in told
    )
    assert not control.should_training_stop
