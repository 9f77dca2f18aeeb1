"""Families of models: what patch_rope makes of the config.json that each of them is published with.

`python tests/test_families.py` prints docs/models.md from the same outcomes. tests/families/ holds what
the published files say of architecture, RoPE and attention; no weights are needed for it.
"""

import contextlib
import importlib
import io
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import numpy as np
import pytest
import torch

import merge
import patch_rope
from longyarn.core import manifest
from longyarn.core.errors import program
from longyarn.models import loading
from longyarn.rope.record import RopeRecord

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ROOT / "tests" / "families"
DOCUMENT = ROOT / "docs" / "models.md"

REASON = {
    "llama-3.1-8b": "its llama3 scaling starts from 8192",
    "mistral-7b-v0.1": "YaRN's authors extend it from 8192",
}


def before(length: int, name: str) -> dict:
    """Return the settings that state what a model was trained at, and why."""
    return {"original_max_position_embeddings": length, "original_reason": REASON[name]}


FULL = {"sliding_window": "full"}
LLAMA_3_1 = {"target_length": 262144} | before(8192, "llama-3.1-8b")
MISTRAL = {"target_length": 65536} | before(8192, "mistral-7b-v0.1")

# Each model of tests/families with the settings of section rope that are tried on it, and the factor that
# follows, or words of the refusal.
CASES = [
    ("llama-2-7b", {"target_length": 32768}, 8),
    ("llama-3-8b", {"target_length": 32768}, 4),
    (
        "llama-3.1-8b",
        {"target_length": 262144},
        "set rope.original_max_position_embeddings to 8192",
    ),
    ("llama-3.1-8b", LLAMA_3_1, 32),
    ("llama-3.1-8b", LLAMA_3_1 | {"target_length": 32768}, "within the 131072 positions"),
    ("mistral-7b-v0.1", MISTRAL, "within a sliding window of 4096"),
    ("mistral-7b-v0.1", MISTRAL | FULL, 8),
    ("mistral-7b-v0.3", {"target_length": 131072}, 4),
    ("qwen2-7b", {"target_length": 262144}, 2),
    ("qwen2.5-7b", {"target_length": 262144}, 2),
    ("qwen3-8b", {"target_length": 163840}, 4),
    ("phi-3-mini-4k", {"target_length": 32768}, "within a sliding window of 2047"),
    ("phi-3-mini-4k", {"target_length": 32768} | FULL, "accepts no RoPE of type 'yarn'"),
    ("phi-3-mini-4k", {"target_length": 32768, "method": "linear"} | FULL, "of type 'linear'"),
    ("phi-3-mini-4k", {"target_length": 32768, "method": "ntk"} | FULL, 8),
    ("phi-3.5-mini", {"target_length": 262144}, "change with the length of the input"),
    ("gemma-2-9b", {"target_length": 32768}, "mixes layers that attend within 4096 tokens"),
    ("gemma-3-4b", {"target_length": 262144}, "gives each kind of layer its own RoPE"),
    ("pythia-1.4b", {"target_length": 16384}, 8),
    ("smollm2-135m", {"target_length": 32768}, 4),
]
NAMES = list(dict.fromkeys(name for name, *_ in CASES))


def published(name: str) -> dict:
    """Return a model's published config.json, as far as tests/families has it."""
    return json.loads((FAMILIES / f"{name}.json").read_text(encoding="utf-8"))


def outcome(
    name: str, settings: dict, directory: Path, config: Path | None = None
) -> tuple[dict | None, str]:
    """Run patch_rope on a model's config; return its facts, or None, and what it said.

    ``config``: a file in place of the published one.
    """
    base = directory / "base"
    base.mkdir(parents=True)
    shutil.copyfile(config or FAMILIES / f"{name}.json", base / "config.json")
    manifest.write(
        directory / "base.json", script=ROOT / "scripts" / "download_model.py", settings={},
        inputs={}, files=[base / "config.json"],
        facts={"directory": "base", "trust_remote_code": False},
    )  # fmt: skip
    settings = {"write_config": True} | settings
    command = [
        "patch_rope.py", "--base", directory / "base.json", "--settings", json.dumps(settings),
        "--manifest", directory / "rope.json", "--output", directory / "rope",
    ]  # fmt: skip
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", list(map(str, command)))
        try:
            program(patch_rope.main)()
        except SystemExit as stop:
            assert not (directory / "rope.json").exists()
            assert not (directory / "rope").exists()
            return None, str(stop.code).removeprefix("error: ")
    return manifest.read_facts(directory / "rope.json"), said.getvalue().strip()


def yarn(settings: dict) -> dict:
    """Return settings with the method that is the default."""
    return {"method": "yarn"} | settings


def in_words(facts: dict | None, said: str) -> str:
    """Return an outcome as docs/models.md has it."""
    if facts is None:
        return f"refused: {said}"
    words = f"works: s = {facts['factor']:g}, {facts['rotary_dim']} rotated dimensions"
    if facts["ramp_limits"]:
        low, high = facts["ramp_limits"]
        words += f", ramp {low} to {high}"
    if facts["replaced"]:
        words += f"; its own {facts['replaced']['rope_type']} scaling is replaced"
    if facts["full_attention"]:
        words += "; its sliding window is removed"
    return words


def settings_in_words(settings: dict) -> str:
    """Return the settings beside the target, as the config has them."""
    shown = {k: v for k, v in settings.items() if k not in ("target_length", "original_reason")}
    return ", ".join(f"`{key}: {value}`" for key, value in shown.items()) or "none"


def own_rope(config: dict) -> str:
    """Return what a published config says of length, RoPE and windows."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    words = f"{config.get('max_position_embeddings', 131072)}, {kind}"
    if config.get("rotary_pct"):
        words += f", rotary_pct {config['rotary_pct']}"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        words += f", window {config['sliding_window']}"
    return words


def rows() -> list[str]:
    """Return the lines of the two tables of docs/models.md."""
    lines = [
        "| model | its own length, RoPE, window | `rope.target_length` | other settings | outcome |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for name, settings, _ in CASES:
        with tempfile.TemporaryDirectory() as directory:
            facts, said = outcome(name, yarn(settings), Path(directory) / "run")
        config = published(name)
        lines.append(
            f"| {config['_name_or_path']} | {own_rope(config)} | {settings['target_length']} | "
            f"{settings_in_words(settings)} | {in_words(facts, said)} |"
        )
    lines += ["", "| model | its untouched base |", "| --- | --- |"]
    for name in NAMES:
        with tempfile.TemporaryDirectory() as directory:
            facts, said = outcome(name, {"method": "none"}, Path(directory) / "run")
        result = f"refused: {said}" if facts is None else "can be evaluated"
        lines.append(f"| {published(name)['_name_or_path']} | {result} |")
    return lines


TEXT = """\
# Models

Where a model comes from, how it is checked, and which families can be extended.

`tests/test_families.py` makes the two tables. It runs the stage `patch_rope` on what each model's published
`config.json` says about architecture, RoPE and attention. `python tests/test_families.py` prints this page,
and a test compares it. So the tables prove the configuration and its frequencies, which must equal
transformers' own to 1e-6. They prove no more: we have not trained any model of this list.

## From the hub, or from a directory

`model.source` is a directory, or owner/name on the Hugging Face hub with `model.revision`.

- **Pinned.** The revision is a commit of 40 hexadecimal digits. A branch or a tag is resolved when the model
  is downloaded, and the log says so. The manifest `base.json` has the commit under `facts.revision`. With
  `model.locked: true` only a commit is accepted.
- **Safetensors only, and only what is needed**: the tensors that the index names, configuration, tokenizer,
  license. Other formats, second copies (`consolidated.safetensors`), subdirectories and, without
  `trust_remote_code`, Python files are not downloaded. A repository without safetensors is refused before
  anything is downloaded.
- **Checked.** Every file is compared with the hub's hash: SHA-256 if it is in LFS, git's blob hash otherwise.
  A file that differs is removed from the cache, and the run stops. The next run downloads it again.
- **In parallel, and resumable.** Eight files are downloaded at a time. After a lost connection a download
  resumes where it was, in pieces of 10 MiB. After a run that was killed, complete files are kept and the
  others are downloaded again.
- **Gated and private repositories** need the token of `hf auth login`, or `HF_TOKEN`. Without access, one
  sentence says what to do, already in the preflight. No manifest and no log contains the token.
- **Without a network** (or with `HF_HUB_OFFLINE=1`), a model that is complete in the cache is used. It is
  checked with the hashes that the hub gave when it was downloaded.
- `HF_ENDPOINT` names another hub. The tests use their own (`tests/hub`), over plain HTTP. We did not try what
  the client does for files in the hub's Xet storage, nor a download from huggingface.co.

A tokenizer with a token beyond the model's `vocab_size` is refused when it is loaded, before training.

## Families

"""

BETWEEN = """
The second table says which models can be evaluated unchanged, as the variant `base`.

"""

NOTES = """
## Notes on the families

- **Llama 3.1** has `llama3` scaling: pairs that turn less than once within 8192 tokens are slowed down by
  8, pairs that turn more than 4 times are unchanged, and the model was trained this way to 131072. YaRN
  replaces it, starting from 8192 and with the same `rope_theta`; one `config.json` cannot combine the two.
  So the fast pairs stay, and the slow ones change from 8 to s times slower. This discards something that
  was learned, so you must ask for it: state the length and a reason. The stage says what it replaces, and
  the manifest records it under `facts.replaced`. A target within 131072 is refused.
- **Mixtral** has no default for `head_dim`, and transformers builds no YaRN if config.json does not state
  it. Such a model is refused, and the error says what to write there, in a local copy.
- **Mistral v0.1** attends within 4096 tokens, and its config says 32768 where YaRN's authors used 8192.
  `rope.sliding_window: full` removes the window from the extended model, as they did. The unchanged base
  keeps it. v0.3 has no window.
- **Qwen 2 and 2.5** state a window and switch it off with `use_sliding_window: false`. A model that
  switches it on has layers of two kinds, and is refused like Gemma 2.
- **Phi-3** in transformers supports only RoPE of the types default and longrope, and reads `yarn` as
  longrope. NTK is default RoPE with another base, so it is the one method that works. The 128k models with
  `longrope` use one set of frequencies up to 4096 tokens and another one beyond. Perplexity at all lengths
  comes from one pass over the longest, which would be wrong for them. So they are refused, as a base too.
- **Gemma 2 and 3** alternate local and global layers. Gemma 3 has different RoPE for each kind. In Gemma 2
  one RoPE serves both, and slowing it down would change distances in the local layers, whose window has not
  grown.
- **GPT-NeoX** rotates a quarter of each head, `rotary_pct`. All formulas use the rotated dimensions.
- A factor of 2 from 131072, as for Qwen above, is valid as a configuration. Memory is another question
  ([planning.md](planning.md)). The plan knows only the shapes of Llama, Mistral and Qwen. For another
  family, set `model.shape` to the nearest.
"""


def document() -> str:
    """Return docs/models.md."""
    cases, bases = "\n".join(rows()).split("\n\n")
    return TEXT + cases + "\n" + BETWEEN + bases + "\n" + NOTES


# The tests.


@pytest.mark.parametrize(("name", "settings", "expected"), CASES)
def test_a_family_works_or_is_refused(name, settings, expected, tmp_path):
    facts, said = outcome(name, yarn(settings), tmp_path / "run")
    if facts is None:
        assert expected in said
        assert len(said.splitlines()) == 1
        return
    assert facts["factor"] == pytest.approx(expected)
    config = published(name)
    assert facts["full_attention"] == ("sliding_window" in settings)
    written = json.loads((tmp_path / "run" / "rope" / "config.json").read_text())
    assert written["max_position_embeddings"] == settings["target_length"]
    assert not {"rope_scaling", "rope_theta", "rotary_pct", "rotary_emb_base"} & set(written)
    if facts["full_attention"]:
        assert written["sliding_window"] is None
        assert f"sliding window of {config['sliding_window']} tokens is removed" in said
    compare_with_transformers(facts, tmp_path / "run")
    assert_by_hand(facts, config, settings)


@pytest.mark.parametrize("name", NAMES)
def test_a_base_as_it_is(name, tmp_path):
    facts, said = outcome(name, {"method": "none"}, tmp_path / "run")
    if facts is None:
        assert name in ("phi-3.5-mini", "gemma-3-4b")
        assert len(said.splitlines()) == 1
        return
    assert (facts["factor"], facts["replaced"], facts["full_attention"]) == (1, None, False)
    assert facts["max_position_embeddings"] == published(name)["max_position_embeddings"]
    compare_with_transformers(facts, tmp_path / "run")


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mistral-7b-v0.1"])
def test_applied_at_load_it_is_the_same(name, tmp_path):
    """Method B: no config.json is written, and the settings go into the configuration at load."""
    settings = yarn(LLAMA_3_1 if name == "llama-3.1-8b" else MISTRAL | FULL)
    written, _ = outcome(name, settings, tmp_path / "a")
    at_load, _ = outcome(name, settings | {"write_config": False}, tmp_path / "b")
    assert written == at_load
    first, second = (load(tmp_path / method) for method in "ab")
    assert first.rope_parameters == second.rope_parameters
    assert getattr(first, "sliding_window", None) is None
    assert getattr(second, "sliding_window", None) is None


def load(run: Path):
    """Return the configuration that every later stage loads."""
    return loading.load_config(run / "base", run / "rope.json")


def compare_with_transformers(facts: dict, run: Path) -> None:
    """Build the family's own rotary module from the loaded configuration, and compare."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load(run)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    name = model_class.__name__.replace("ForCausalLM", "RotaryEmbedding")
    rotary = getattr(importlib.import_module(model_class.__module__), name)(config)
    theirs = rotary.inv_freq.double().numpy()
    assert theirs.shape == (facts["rotary_dim"] // 2,)
    np.testing.assert_allclose(theirs, facts["inverse_frequencies"], rtol=1e-6)
    assert facts["attention_factor"] == pytest.approx(rotary.attention_scaling, rel=1e-6)


def assert_by_hand(facts: dict, config: dict, settings: dict) -> None:
    """The fastest and the slowest pair, from the published numbers alone."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    dim = int(dim * config.get("rotary_pct", 1))
    theta = config.get("rope_theta", config.get("rotary_emb_base", 10000))
    fastest, slowest = facts["inverse_frequencies"][0], facts["inverse_frequencies"][-1]
    assert facts["rotary_dim"] == dim
    assert fastest == pytest.approx(1)
    assert slowest == pytest.approx(theta ** (-(dim - 2) / dim) / facts["factor"])
    temperature = 0.1 * math.log(facts["factor"]) + 1
    expected = 1 if settings.get("method") == "ntk" else temperature
    assert facts["attention_factor"] == pytest.approx(expected)


def test_the_replaced_scaling_is_said_and_kept(tmp_path):
    facts, said = outcome("llama-3.1-8b", yarn(LLAMA_3_1), tmp_path / "run")
    own = published("llama-3.1-8b")["rope_scaling"] | {"rope_theta": 500000.0}
    assert facts["replaced"] == own
    assert "yarn replaces the model's own RoPE scaling" in said
    assert "training must undo them as well" in said


def test_another_start_than_the_scalings_own(tmp_path):
    settings = LLAMA_3_1 | {"original_max_position_embeddings": 131072}
    facts, said = outcome("llama-3.1-8b", yarn(settings), tmp_path / "run")
    assert facts is None
    assert (
        "131072 is not the length 8192 where the model's own scaling of type 'llama3' starts"
        in said
    )


# Small models of two families, built and run.


def small(name: str, directory: Path, settings: dict, **sizes):
    """Make a random model of a family, run patch_rope on it, and load it as later stages do."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "vocab_size": 64,
    } | sizes
    config = published(name) | sizes | {"num_attention_heads": 2}
    if "num_key_value_heads" in config:
        config["num_key_value_heads"] = 2
    config = AutoConfig.for_model(**config)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "weights")
    facts, said = outcome(name, settings, directory / "run", directory / "weights" / "config.json")
    assert facts is not None, said
    model = loading.load_model(
        directory / "weights", directory / "run" / "rope.json", dtype="fp32", attention="sdpa"
    )
    return model.eval(), facts


def sees(model, distance: int) -> bool:
    """Tell whether a token has an influence on the logits of another, so many tokens later."""
    tokens = torch.randint(0, 64, (1, distance + 1), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 64
    with torch.no_grad():
        first, second = (model(input_ids=t, use_cache=False).logits[0, -1] for t in (tokens, other))
    return not torch.equal(first, second)


def test_a_lifted_window_is_lifted(tmp_path):
    """One layer, so that nothing is passed on; the base keeps its window, a merged model has none."""
    settings = {"method": "yarn", "target_length": 128}
    sizes = {"sliding_window": 16, "max_position_embeddings": 32}
    base, _ = small("mistral-7b-v0.1", tmp_path / "base", {"method": "none"}, **sizes)
    assert sees(base, 15)
    assert not sees(base, 16)
    for write in (True, False):
        directory = tmp_path / f"full-{write}"
        model, facts = small(
            "mistral-7b-v0.1", directory, settings | FULL | {"write_config": write}, **sizes
        )
        assert sees(model, 16)
        assert sees(model, 100)
    (tmp_path / "merged").mkdir()
    rope = RopeRecord.from_facts(facts)
    merge.copy_rest(directory / "weights", tmp_path / "merged", rope, None)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["sliding_window"] is None


def test_partial_rotation_in_a_built_model(tmp_path):
    """load_model compares what is built with the manifest: 8 of 32 dimensions."""
    model, facts = small(
        "pythia-1.4b", tmp_path, yarn({"target_length": 4096}), max_position_embeddings=512
    )
    assert facts["rotary_dim"] == 8
    assert model.gpt_neox.rotary_emb.inv_freq.shape == (4,)
    assert sees(model, 100)


def test_the_document_is_up_to_date():
    assert DOCUMENT.read_text(encoding="utf-8") == document(), (
        "run `python tests/test_families.py > docs/models.md`"
    )


if __name__ == "__main__":
    print(document(), end="")
