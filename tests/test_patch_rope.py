"""RoPE: our frequencies against an independent implementation, and against transformers' own."""

import json
import math
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from stages import edit_json
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import patch_rope
from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.models import loading
from longyarn.rope.extend import extend
from longyarn.rope.frequencies import attention_factor, inverse_frequencies, ramp_limits
from longyarn.rope.parameters import check_parameters
from longyarn.rope.record import RopeRecord

FACTORS, THETAS, HEADS = (2, 8, 16, 32), (1e4, 5e5, 1e6), (32, 64, 128)
GRID = [(s, theta, d) for s in FACTORS for theta in THETAS for d in HEADS]


def reference_yarn(factor, theta, dim, length, beta_fast=32, beta_slow=1):
    """YaRN as the published reference defines it, pair by pair: a ramp over the pair's index.

    Written independently of the module under test: scalar arithmetic, high-precision logarithms.
    """

    def index_of(rotations):
        turns = Decimal(length) / (Decimal(rotations) * 2 * Decimal(str(math.pi)))
        return float(dim * turns.ln() / (2 * Decimal(theta).ln()))

    low = max(math.floor(index_of(beta_fast)), 0)
    high = min(math.ceil(index_of(beta_slow)), dim - 1)
    frequencies = []
    for pair in range(dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / dim)
        ramp = (pair - low) / ((high - low) or 0.001)
        ramp = min(1.0, max(0.0, ramp))
        kept, divided = 2 * math.pi / wavelength, 2 * math.pi / (wavelength * factor)
        frequencies.append(ramp * divided + (1 - ramp) * kept)
    return np.array(frequencies), 0.1 * math.log(factor) + 1


def paper_yarn(factor, theta, dim, length, beta_fast=32, beta_slow=1):
    """YaRN as the paper's equations say (arXiv 2309.00071, section 3.2): a ramp over r = L/λ."""
    frequencies = []
    for pair in range(dim // 2):
        kept = theta ** (-2 * pair / dim)
        turns = length * kept / (2 * math.pi)
        gamma = min(1.0, max(0.0, (turns - beta_slow) / (beta_fast - beta_slow)))
        frequencies.append((1 - gamma) * kept / factor + gamma * kept)
    return np.array(frequencies)


def llama(dim=128, theta=1e4, length=4096, **more):
    return LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
        vocab_size=64,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        **more,
    )


def extended(method, factor=8, theta=1e4, dim=128, length=4096, **more):
    parameters, _, _ = extend(
        {"rope_type": "default", "rope_theta": theta},
        method=method,
        max_position_embeddings=length,
        rotary_dim=dim,
        target_length=int(length * factor),
        **more,
    )
    return parameters


@pytest.mark.parametrize(("factor", "theta", "dim"), GRID)
def test_yarn_equals_the_reference(factor, theta, dim):
    parameters = extended("yarn", factor, theta, dim)
    ours, scale = inverse_frequencies(parameters, dim)
    expected, expected_scale = reference_yarn(factor, theta, dim, 4096)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


@pytest.mark.parametrize(("factor", "theta", "dim"), GRID)
@pytest.mark.parametrize("method", ["yarn", "linear", "ntk"])
def test_equals_transformers(method, factor, theta, dim):
    parameters = extended(method, factor, theta, dim)
    config = llama(dim, theta)
    config.rope_parameters = dict(parameters)
    config.max_position_embeddings = 4096 * factor
    if parameters["rope_type"] == "default":
        rotary = LlamaForCausalLM(config).model.rotary_emb
        theirs, scale = rotary.inv_freq, rotary.attention_scaling
    else:
        theirs, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    ours, our_scale = inverse_frequencies(parameters, dim)
    assert theirs.dtype == torch.float32
    np.testing.assert_allclose(theirs.double().numpy(), ours, rtol=1e-6)
    assert our_scale == pytest.approx(scale, rel=1e-6)


def test_llama_2_ramps_between_20_and_46():
    assert ramp_limits(extended("yarn"), 128) == (20, 46)


def test_a_wrong_original_length_moves_the_ramp():
    wrong = extended("yarn") | {"original_max_position_embeddings": 32768}
    assert ramp_limits(wrong, 128) == (35, 60)


def test_distance_from_the_papers_ramp():
    """The figures that docs/rope.md shows: Llama-2, s = 8."""
    ours, _ = inverse_frequencies(extended("yarn"), 128)
    paper = paper_yarn(8, 1e4, 128, 4096)
    distance = np.abs(paper / ours - 1)
    assert round(100 * distance.max()) == 57
    # Outside both ramps they agree.
    np.testing.assert_allclose(ours[46:], paper[46:], rtol=1e-12)
    np.testing.assert_allclose(ours[:20], paper[:20], rtol=1e-12)


def test_attention_factor_at_8():
    assert inverse_frequencies(extended("yarn"), 128)[1] == pytest.approx(1.2079, abs=5e-5)
    assert attention_factor(extended("yarn", attention_factor=1.0)) == 1.0


def test_ntk_divides_the_slowest_pair_by_s_and_leaves_the_fastest():
    ours, scale = inverse_frequencies(extended("ntk"), 128)
    plain, _ = inverse_frequencies({"rope_type": "default", "rope_theta": 1e4}, 128)
    assert plain[-1] / ours[-1] == pytest.approx(8, rel=1e-9)
    assert ours[0] == plain[0]
    assert scale == 1.0


def reference_llama_3(theta, dim, factor, low, high, length):
    """Llama 3.1's scaling as its authors published it: by wavelength, pair by pair."""
    frequencies = []
    for pair in range(dim // 2):
        frequency = theta ** (-2 * pair / dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            frequencies.append(frequency)
        elif wavelength > length / low:
            frequencies.append(frequency / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            frequencies.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(frequencies)


@pytest.mark.parametrize("dim", HEADS)
@pytest.mark.parametrize(("factor", "low", "high"), [(8, 1, 4), (32, 1, 4), (4, 0.5, 8)])
def test_llama_3_equals_the_reference(dim, factor, low, high):
    """What the untouched Llama 3.1 (8, 1, 4) and 3.2 (32, 1, 4) rotate by."""
    parameters = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": high, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    ours, scale = inverse_frequencies(parameters, dim)
    expected = reference_llama_3(5e5, dim, factor, low, high, 8192)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert scale == 1


# What is refused.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": 4}, ["rope.factor 4", "= 8"]),
        ({"original_max_position_embeddings": 2048}, ["original_max_position_embeddings 2048"]),
        ({"target_length": 4096}, ["rope.target_length 4096"]),
        ({"beta_fast": 1, "beta_slow": 1}, ["beta_fast"]),
        ({"method": "ntk", "attention_factor": 1.1}, ["attention_factor"]),
    ],
)
def test_contradictions_are_refused(change, words):
    settings = {"method": "yarn", "target_length": 32768} | change
    with pytest.raises(UserError) as error:
        extend(
            {"rope_type": "default", "rope_theta": 1e4},
            max_position_embeddings=4096,
            rotary_dim=128,
            **settings,
        )
    assert all(word in str(error.value) for word in words)


def test_a_reason_lets_the_stated_original_length_win():
    """Mistral v0.1 says 32768 where YaRN used 8192."""
    parameters, factor, original = extend(
        {"rope_type": "default", "rope_theta": 1e4},
        method="yarn",
        max_position_embeddings=32768,
        rotary_dim=128,
        target_length=65536,
        original_max_position_embeddings=8192,
        original_reason="trained with a window of 8192",
    )
    assert (factor, original) == (8, 8192)
    assert parameters["original_max_position_embeddings"] == 8192


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 8, "attn_factor": 1.2}, "attn_factor"),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 8}, "original_max_position_embeddings"),
        ({"rope_type": "linear", "factor": 8}, "rope_theta"),
        ({"rope_type": "llama3", "rope_theta": 1e4}, "lacks 'factor'"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}, "dynamic"),
        ({"rope_type": "longrope", "rope_theta": 1e4}, "longrope"),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {}}, "all layers"),
    ],
)
def test_parameters_that_could_be_misread_are_refused(parameters, word):
    with pytest.raises(UserError, match=word):
        check_parameters(parameters)


# The stage: written (method A) and at load (method B).


def save_base(directory: Path, config) -> Path:
    LlamaForCausalLM(config).save_pretrained(directory / "base")
    return record_base(directory)


def record_base(directory: Path, trust_remote_code: bool = False) -> Path:
    """Write the manifest of the model in ``base``."""
    manifest.write(
        directory / "base.json",
        script=ROOT / "scripts" / "download_model.py",
        settings={},
        inputs={},
        files=sorted((directory / "base").iterdir()),
        facts={"directory": "base", "trust_remote_code": trust_remote_code},
    )
    return directory / "base.json"


def patch(base: Path, name: str, **settings):
    settings = {"method": "yarn", "target_length": 4096, "write_config": True} | settings
    command = [sys.executable, ROOT / "scripts" / "patch_rope.py", "--base", base]
    command += ["--settings", json.dumps(settings), "--manifest", base.parent / f"{name}.json"]
    command += ["--output", base.parent / name]
    done = subprocess.run(command, capture_output=True, text=True)
    return base.parent / f"{name}.json", done


def frequencies_of(path: Path, base: Path):
    model = loading.load_model(base.parent / "base", path, dtype="fp32", attention="sdpa")
    return model.model.rotary_emb.inv_freq, model.config


def test_method_a_and_method_b_give_identical_frequencies(tmp_path):
    base = save_base(tmp_path, llama(32, length=512))
    written, done = patch(base, "a")
    assert done.returncode == 0, done.stderr
    at_load, done = patch(base, "b", write_config=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "config.json").is_file()
    assert not list((tmp_path / "b").iterdir())
    (first, config), (second, other) = frequencies_of(written, base), frequencies_of(at_load, base)
    assert torch.equal(first, second)
    assert config.rope_parameters == other.rope_parameters
    assert config.max_position_embeddings == other.max_position_embeddings == 4096
    plain = LlamaForCausalLM(llama(32, length=512)).model.rotary_emb.inv_freq
    assert not torch.allclose(first, plain)


@pytest.mark.parametrize("write_config", [True, False])
def test_a_model_with_code_of_its_own(tmp_path, write_config):
    """Its Python files lie beside its weights, not beside the config that is written."""
    own = llama(32, length=512)
    model = LlamaForCausalLM(own)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
    )
    (tmp_path / "base" / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "configuration_own.OwnConfig"}
    classes["AutoModelForCausalLM"] = "modeling_own.OwnModel"
    edit_json(tmp_path / "base" / "config.json", model_type="own", auto_map=classes)
    base = record_base(tmp_path, trust_remote_code=True)
    written, done = patch(base, "rope", write_config=write_config)
    assert done.returncode == 0, done.stderr
    loaded = loading.load_model(
        tmp_path / "base", written, dtype="fp32", attention="sdpa", trust_remote_code=True
    )
    assert type(loaded).__name__ == "OwnModel"
    assert loaded.config.max_position_embeddings == 4096
    assert loaded.config.rope_parameters["rope_type"] == "yarn"
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_changed_config_is_noticed_at_load(tmp_path):
    base = save_base(tmp_path, llama(32, length=512))
    written, _ = patch(base, "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    text = json.dumps(config).replace('"factor": 8.0', '"factor": 4.0')
    assert text != json.dumps(config)
    config_path = tmp_path / "a" / "config.json"
    size = config_path.stat().st_size
    config_path.write_text(json.dumps(json.loads(text), indent=1).ljust(size)[:size])
    with pytest.raises(UserError, match="has RoPE"):
        loading.load_config(tmp_path / "base", written)


def test_rope_set_after_loading_is_noticed(tmp_path):
    base = save_base(tmp_path, llama(32, length=512))
    written, _ = patch(base, "a")
    rope = RopeRecord.read(written)
    model = LlamaForCausalLM(llama(32, length=512))
    model.config.rope_parameters = dict(rope.rope_parameters)
    with pytest.raises(UserError, match="does not rotate"):
        rope.check_model(model)


def test_rotation_in_bfloat16_is_noticed(tmp_path):
    base = save_base(tmp_path, llama(32, length=512))
    written, _ = patch(base, "a")
    model = loading.load_model(tmp_path / "base", written, dtype="bf16", attention="sdpa")
    assert model.dtype == torch.bfloat16
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()
    with pytest.raises(UserError, match="float32"):
        RopeRecord.read(written).check_model(model)


def test_legacy_rope_scaling_is_read_and_written_in_todays_form(tmp_path):
    base = save_base(tmp_path, llama(32, length=512))
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    config["max_position_embeddings"] = 2048
    path.write_text(json.dumps(config))
    record = json.loads(base.read_text())
    record["files"]["base/config.json"]["size"] = path.stat().st_size
    base.write_text(json.dumps(record))

    untouched, done = patch(base, "none", method="none")
    assert done.returncode == 0, done.stderr
    assert manifest.read(untouched)["facts"]["rope_parameters"]["rope_type"] == "linear"
    _, done = patch(base, "refused")
    assert done.returncode == 1
    assert "already has RoPE scaling" in done.stderr
    assert "Traceback" not in done.stderr
    reason = {"original_max_position_embeddings": 512, "original_reason": "trained at 512"}
    _, done = patch(base, "yarn", **reason)
    assert done.returncode == 0, done.stderr
    new = json.loads((tmp_path / "yarn" / "config.json").read_text())
    assert new["rope_parameters"]["rope_type"] == "yarn"
    assert "rope_scaling" not in new
    assert "rope_theta" not in new
    assert "type" not in new["rope_parameters"]


def test_yarn_for_a_model_that_does_not_state_its_heads_size_is_refused(tmp_path):
    """transformers would fail on it when the model is built, and does not once it is stated."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    wanted = {"model_type": "mixtral", "rope_parameters": rope | {"rope_theta": 1e4}} | sizes
    with pytest.raises(UserError, match='write "head_dim": 32 there'):
        patch_rope.check_accepted(MixtralConfig, wanted, "yarn")
    patch_rope.check_accepted(MixtralConfig, wanted | {"head_dim": 32}, "yarn")
    small = {"vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 32}
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(MixtralConfig.from_dict(wanted | small))
