"""The plan's model: parameter counts, memory against what is measured here and against what is published.

The memory of real training steps is measured by benchmarks/memory.py, of which the quick cases run here.
"""

import json
import sys

import pytest
import snakemake.utils
import torch
import transformers
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory

from longyarn.cluster import estimate, hardware, job_resources, model_shapes
from longyarn.config.load import complete
from longyarn.core.errors import UserError
from longyarn.evaluation.window_losses import LOGITS_AT_ONCE

KNOWN = yaml.safe_load((ROOT / "resources/shapes.yaml").read_text())
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
}
LORA = {
    "rank": 8, "alpha": 16, "dropout": 0, "rslora": False, "targets": "all-linear", "train_embeddings": False,
    "train_norms": False, "train_output_head": False,
}  # fmt: skip


def on_meta(record: dict):
    """Return transformers' own model of a config.json, without memory for its weights."""
    record = dict(record)
    settings = transformers.AutoConfig.for_model(record.pop("model_type"), **record)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(settings)


@pytest.mark.parametrize("name", KNOWN)
def test_a_shape_has_the_published_number_of_parameters(name):
    assert model_shapes.named(name).parameters == PUBLISHED[name]
    assert sum(tensor.numel() for tensor in on_meta(KNOWN[name]).parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(
    "odd",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen3", "head_dim": 96},
        {"model_type": "qwen2", "tie_word_embeddings": True},
    ],
)
def test_biases_norms_of_heads_and_odd_heads_are_counted(odd):
    record = KNOWN["smollm2-135m"] | odd
    expected = sum(tensor.numel() for tensor in on_meta(record).parameters())
    assert model_shapes.Shape.of(record).parameters == expected


@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        LORA | {"targets": "attention"},
        LORA | {"train_embeddings": True, "train_norms": True, "train_output_head": True},
    ],
)
@pytest.mark.parametrize("name", ["mistral-7b", "smollm2-135m"])
def test_trained_parameters_are_those_of_the_adapter(name, lora):
    from longyarn.models.lora import attach

    model = attach(on_meta(KNOWN[name]), lora)
    trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    assert model_shapes.named(name).trained_parameters("lora", lora) == trained


def test_an_architecture_that_the_plan_does_not_know_is_refused():
    with pytest.raises(UserError, match="model_type mixtral, whose memory the plan does not know"):
        model_shapes.Shape.of({"model_type": "mixtral"}, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "4096"),
        ("num_attention_heads", 0),
        ("num_key_value_heads", -1),
        ("vocab_size", True),
        ("head_dim", 64.0),
    ],
)
def test_a_size_that_is_none_is_refused(key, value):
    with pytest.raises(UserError, match=f"^c.json has {key} {json.dumps(value)}, which must be"):
        model_shapes.Shape.of(KNOWN["mistral-7b"] | {key: value}, "c.json")
    if key != "head_dim" and key != "num_key_value_heads":
        record = {name: size for name, size in KNOWN["mistral-7b"].items() if name != key}
        with pytest.raises(UserError, match=f"^c.json lacks {key}"):
            model_shapes.Shape.of(record, "c.json")


def test_sizes_that_follow_from_others_may_be_null():
    record = KNOWN["llama-2-7b"] | {"num_key_value_heads": None, "head_dim": None}
    assert model_shapes.Shape.of(record) == model_shapes.named("llama-2-7b")


def test_where_a_shape_comes_from(tmp_path):
    config = {
        "paths": {"results": str(tmp_path)},
        "run": "r",
        "model": {"source": "owner/name", "shape": None},
    }
    assert model_shapes.find(config) is None
    config["model"]["shape"] = "mistral-7b"
    assert model_shapes.find(config) == model_shapes.named("mistral-7b")
    base = tmp_path / "r" / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text((ROOT / "resources/micro-base/config.json").read_text())
    (base.parent / "base.json").write_text('{"facts": {"source": "other/model"}}')
    assert model_shapes.find(config) == model_shapes.named(
        "mistral-7b"
    )  # of a run with another model
    (base.parent / "base.json").write_text('{"facts": {"source": "owner/name"}}')
    assert model_shapes.find(config).hidden_size == 128  # what was downloaded counts more
    local = tmp_path / "local"
    local.mkdir()
    config["model"]["source"] = str(local)
    (local / "config.json").write_text(json.dumps(KNOWN["smollm2-135m"]))
    assert model_shapes.find(config) == model_shapes.named("smollm2-135m")
    (local / "config.json").write_text('{"model_type": "mixtral"}')
    (base / "config.json").unlink()
    assert model_shapes.find(config) == model_shapes.named("mistral-7b")
    config["model"]["shape"] = None
    with pytest.raises(UserError, match="mixtral"):
        model_shapes.find(config)


@pytest.fixture(scope="module")
def libraries() -> float:
    """Bytes of Python and the libraries, measured with a model of almost nothing."""
    return memory.libraries()


@pytest.mark.parametrize("case", ["micro", "1b"])
def test_memory_of_real_steps_within_15_percent(case, libraries):
    """Both peaks, in the steps and with saving, without the libraries, which would flatter."""
    for own, guess in zip(memory.measured(case), memory.estimated(case), strict=True):
        assert guess == pytest.approx(own - libraries, rel=0.15)


def gib(name: str, **setup) -> float:
    """Return the GiB of a GPU that training needs."""
    parts = estimate.memory(model_shapes.named(name), estimate.Setup(**setup))
    return estimate.peak(parts) / estimate.GIB


def room(name: str) -> float:
    return hardware.known_gpus()[name]["gib"]


def test_alst_llama_8b_on_one_h100():
    """ALST (arXiv 2506.13996): 32k is the most without tiling, weights and optimizer offloaded."""
    baseline = {
        "mode": "full", "zero_stage": 3, "offload_weights": True, "offload_optimizer": True,
        "attention": "flash_attention_2",
    }  # fmt: skip
    assert gib("llama-3-8b", length=32768, **baseline) < room("h100-80gb")
    assert gib("llama-3-8b", length=65536, **baseline) > room("h100-80gb")


def test_qwen2_7b_lora_at_32k_on_one_a800():
    """LLaMA-Factory's issue 4642: out of memory with the stock loss, ZeRO-3 with offload, batch 1."""
    issue = {
        "mode": "lora", "lora": LORA, "zero_stage": 3, "offload_weights": True,
        "offload_optimizer": True, "attention": "flash_attention_2",
    }  # fmt: skip
    assert gib("qwen2-7b", length=32768, **issue) > room("a100-80gb")
    assert gib("qwen2-7b", length=16384, **issue) < room("a100-80gb")


def test_zero_shares_what_the_paper_says():
    """arXiv 1910.02054, figure 1: 7.5 B parameters on 64 GPUs: 120, 31.4, 16.6 and 1.9 GB.

    The paper counts 2 bytes of weights, 2 of gradients and 12 of states for each parameter.
    """
    shape, states = model_shapes.named("qwen2-7b"), {}
    for stage in range(4):
        parts = estimate.memory(
            shape, estimate.Setup(length=1024, mode="full", zero_stage=stage, processes=64)
        )
        names = ("weights", "gradients", "master copies", "optimizer state")
        states[stage] = sum(parts[name] for name in names)
    states[3] -= 2 * estimate.LIVE_PARAMETERS  # gathered for a moment; not in the paper's figure
    for stage, published in enumerate([120, 31.4, 16.6, 1.9]):
        assert states[stage] / 1e9 * 7.5e9 / shape.parameters == pytest.approx(published, rel=0.02)


def test_memory_moves_the_right_way():
    length = {"length": 32768, "lora": LORA}
    plain = gib("llama-2-7b", **length)
    assert gib("llama-2-7b", gradient_checkpointing=False, **length) > 2 * plain
    assert gib("llama-2-7b", attention="flash_attention_2", **length) == plain
    assert gib("llama-2-7b", attention="eager", **length) > 100 + plain
    assert gib("llama-2-7b", sequence_parallel=4, **length) < plain
    assert gib("llama-2-7b", zero_stage=3, processes=8, **length) < plain


def test_arithmetic_is_six_a_parameter_and_token_plus_attention():
    """6·N·T (arXiv 2001.08361) for full training of short sequences, of all but the input embedding."""
    shape = model_shapes.named("llama-2-7b")
    setup = estimate.Setup(length=1, mode="full", gradient_checkpointing=False)
    flops = estimate.training_flops(shape, setup, tokens=1)
    assert flops == pytest.approx(6 * (shape.parameters - shape.embedding_parameters), rel=1e-3)
    long = estimate.Setup(length=32768, mode="full", gradient_checkpointing=False)
    attention = 6 * shape.num_hidden_layers * shape.attention_size * 32768
    assert estimate.training_flops(shape, long, 1) - flops == pytest.approx(attention, rel=1e-3)


def test_arithmetic_of_a_real_step(monkeypatch):
    """torch's own counter, on the micro base: LoRA and full, checkpointed and not."""
    from torch.utils.flop_counter import FlopCounterMode

    from longyarn.models.lora import attach

    length = 512
    record = {key: value for key, value in memory.MICRO.items() if key != "transformers_version"}
    shape = model_shapes.Shape.of(record)
    for mode in ("full", "lora"):
        for again in (False, True):
            settings = transformers.LlamaConfig(**record, attn_implementation="eager")
            model = transformers.LlamaForCausalLM(settings).train()
            model.config.use_cache = False
            if mode == "lora":
                model = attach(model, LORA)
                model.enable_input_require_grads()
            if again:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            ids = torch.zeros((1, length), dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                model(input_ids=ids, labels=ids).loss.backward()
            setup = estimate.Setup(
                length=length, mode=mode, lora=LORA, gradient_checkpointing=again
            )
            guess = estimate.training_flops(shape, setup, length)
            # Eager attention computes the half that causality hides; ours counts the other half.
            attention = estimate.forward_flops(shape, length)[2] * length * (3 + again)
            assert guess + attention == pytest.approx(counter.get_total_flops(), rel=0.03), mode


def test_what_other_files_say_too():
    from longyarn.evaluation import passkey_prompts

    assert passkey_prompts.TOKENS_AT_ONCE == estimate.EVALUATED_AT_ONCE
    assert LOGITS_AT_ONCE == estimate.LOGITS_AT_ONCE


def test_disk_of_a_finished_run(finished):
    """Everything that the stages wrote, but for the small files that no estimate counts."""
    from stages import MICRO_BASE

    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    snakemake.utils.update_config(config, yaml.safe_load((ROOT / "tests/config.yaml").read_text()))
    config = complete(config, ROOT / "schemas/config.schema.yaml")
    base = (MICRO_BASE / "model.safetensors").stat().st_size
    guess = estimate.disk(model_shapes.Shape.of(memory.MICRO), config, base)
    files = {
        "base model": "results/tests/base/*.safetensors",
        "merged model": "results/tests/merged/*.safetensors",
        "packed sequences": "results/tests/pack/*.safetensors",
        "what is trained": "results/tests/trained/*.safetensors",
        "checkpoints": "work/**/*",
    }
    for part, pattern in files.items():
        found = [path for path in finished.directory.glob(pattern) if path.is_file()]
        written = sum(path.stat().st_size for path in found)
        print(part, written, guess[part])
        assert guess[part] == pytest.approx(written, rel=0.15, abs=3e5), part


def configuration(**training) -> dict:
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    config["training"] |= training
    return complete(config, ROOT / "schemas/config.schema.yaml")


def test_requests_grow_with_attempts_and_never_fall_below_what_starting_takes():
    config = configuration()
    for stage in (path.stem for path in (ROOT / "rules").glob("*.smk")):
        if stage in ("common", "plan"):
            continue
        for what, least in (("mem_mb", 1000), ("runtime", 30)):
            first = job_resources.request(config, stage, what)
            assert first >= least
            assert job_resources.request(config, stage, what, 2) == round(1.5 * first)


def test_a_model_too_large_for_one_gpu_is_spread():
    config = configuration(gpus=1, batch_size=1)
    config["evaluation"]["precision"] = "bf16"
    config["evaluation"]["passkey"]["lengths"] = [32768]
    for name, count in {"llama-2-7b": 1, "llama-2-70b": 4, "smollm2-135m": 1}.items():
        config["model"] = config["model"] | {"source": "owner/name", "shape": name}
        assert job_resources.request(config, "passkey", "gpu") == count
    assert job_resources.request(configuration(), "passkey", "gpu") == 0


def test_an_unknown_shape_gets_the_stated_default():
    config = configuration()
    config["model"] = config["model"] | {"source": "owner/name"}
    for stage in ("train", "merge", "perplexity"):
        assert job_resources.request(config, stage, "mem_mb") == job_resources.UNKNOWN["mem_mb"]
