"""The extension in phases: each is trained from the merged model of the one before it."""

import pytest
import torch
from safetensors.torch import load_file
from test_config import DEFAULT, SCHEMA_PATH, changed, refusal

import verify
from longyarn.cluster import hardware
from longyarn.config.load import complete
from longyarn.config.phases import phases
from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.core.files import read_json, write_json
from longyarn.provenance.verification import Run
from longyarn.training import identity

EARLIER = {
    "rope": {"target_length": 768},
    "mix": {"token_budget": 6144},
    "training": {"steps": 2, "warmup_steps": 0, "held_out_steps": None},
}


def delta(directory, name: str) -> torch.Tensor:
    """Return what an adapter adds to a matrix, worked out by hand."""
    record = read_json(directory / "adapter_config.json")
    adapter = load_file(directory / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    return b @ a * record["lora_alpha"] / record["r"]


def test_a_phase_starts_from_the_merged_model_of_the_one_before(finished_copy):
    finished_copy.snakemake(overrides={"phases": [EARLIER]})
    run = finished_copy.directory / "results" / "tests"
    base, first, last = (
        load_file(run / part / "model.safetensors") for part in ("base", "phase-1/merged", "merged")
    )
    name = "model.layers.0.self_attn.q_proj"
    learnt = [delta(run / part, name) for part in ("phase-1/trained", "trained")]
    assert all(part.norm() > 0 for part in learnt)
    torch.testing.assert_close(first[f"{name}.weight"], base[f"{name}.weight"] + learnt[0])
    torch.testing.assert_close(last[f"{name}.weight"], base[f"{name}.weight"] + sum(learnt))

    factors = {
        part: read_json(run / part / "config.json")["rope_parameters"]["factor"]
        for part in ("phase-1/merged", "merged")
    }
    assert factors == {"phase-1/merged": 1.5, "merged": 2.0}  # of the model's own 512 positions
    adapter = read_json(run / "trained" / "adapter_config.json")
    assert adapter["base_model_name_or_path"] == "phase-1/merged"

    report = read_json(run / "report.json")
    assert report["chain"]["broken"] == 0
    (earlier,) = report["phases"]
    assert earlier["rope"]["target_length"] == earlier["mix"]["sequence_length"] == 768
    assert earlier["training"]["steps"] == 2
    assert "phase-1: YaRN to 768 tokens, 2 steps" in (run / "report.html").read_text()
    assert (run / "logs" / "phase-1" / "train.metrics.jsonl").is_file()
    assert verify.findings(Run(run)) == []

    other = EARLIER | {"training": EARLIER["training"] | {"learning_rate": 2.0e-3}}
    assert finished_copy.planned({"phases": [other]}) == {
        "train": 2, "merge": 2, "perplexity": 1, "passkey": 1, "report": 1, "gate": 1, "export": 1,
        "provenance": 1,
    }  # fmt: skip


def test_a_phase_made_anew_with_the_same_weights_is_the_same_start(finished, tmp_path):
    """Settings that only watch are in a phase's manifest, but start nothing anew after it."""
    run = finished.directory / "results" / "tests"
    inputs = {"base": run / "base.json", "rope": run / "rope/yarn.json", "pack": run / "pack.json"}
    settings = read_json(run / "trained.json")["settings"]
    record = read_json(inputs["base"])
    for name, altered in (
        ("settings", record | {"settings": {"save_steps": 7}, "inputs": {"train": "0" * 64}}),
        (
            "weights",
            record | {"files": {"base/model.safetensors": {"size": 1, "sha256": "0" * 64}}},
        ),
    ):
        other = tmp_path / f"{name}.json"
        write_json(other, altered)
        found = identity.of_run(settings, "code", inputs | {"base": other}, run / "trained.json")
        same = found == identity.of_run(settings, "code", inputs, run / "trained.json")
        assert same == (name == "settings")


def test_a_phase_s_hardware_is_checked_too():
    phase = {"training": {"attention": "flash_attention_2", "precision": "bf16"}}
    made = complete(changed(DEFAULT, "phases", [phase]), SCHEMA_PATH)
    with pytest.raises(UserError, match=r"in phase-1 of .* but training\.gpus is 0"):
        hardware.check(made)


def test_sequences_can_be_shorter_than_the_target(finished_copy):
    overrides = {"mix": {"sequence_length": 768, "token_budget": 7680}}
    finished_copy.snakemake("results/tests/pack.json", overrides=overrides)
    facts = manifest.read_facts(finished_copy.directory / "results/tests/pack.json")
    assert facts["sequence_length"] == 768
    assert facts["tokens_packed"] == 7680
    overrides["mix"]["sequence_length"] = 256
    done = finished_copy.snakemake("results/tests/pack.json", overrides=overrides, check=False)
    assert "error: mix.sequence_length 256 is shorter than the model's original" in done.stdout


def test_a_phase_has_the_run_s_settings_but_for_its_changes():
    made = phases(DEFAULT | {"phases": [EARLIER, {"training": {"lora": {"rank": 4}}}]})
    assert list(made) == ["phase-1/", "phase-2/", ""]
    assert made["phase-1/"]["rope"] == DEFAULT["rope"] | EARLIER["rope"]
    assert made["phase-2/"]["training"]["lora"] == DEFAULT["training"]["lora"] | {"rank": 4}
    assert made["phase-2/"]["rope"] == DEFAULT["rope"]
    assert made[""]["training"] == DEFAULT["training"]


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ({"training": {"stepz": 1}}, "did you mean 'steps'"),
        ({"training": {"learning_rate": 0}}, "must be more than 0"),
        ({"training": {"gpus": 2}}, "training.gpus is that of the whole run, 0"),
        ({"training": {"batch_size": 3, "micro_batch_size": 2}}, "choose a multiple of 2"),
        ({"training": {"early_stopping": 2}}, "set training.held_out_steps"),
        ({"mix": {"sequence_length": 8192}}, "longer than rope.target_length 4096"),
        ({"rope": {"factor": 4, "original_max_position_embeddings": 512}}, "contradicts"),
        ({"model": {"source": "other"}}, "'phases[0].model' is unknown"),
    ],
)
def test_a_phase_that_cannot_be_is_refused_by_name(phase, words):
    sentence = refusal(DEFAULT, {"phases": [phase]})
    assert words in sentence
    assert "phase" in sentence
