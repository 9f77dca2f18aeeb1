"""The merge: logits of base + adapter, from one file or from shards, and a model that loads alone."""

import functools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stages import small_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longyarn.core import manifest, tensorfile
from longyarn.models import loading, lora_files, merging
from longyarn.rope.record import RopeRecord

IDS = torch.arange(200)[None] % 97


def test_merged_logits_equal_base_plus_adapter(finished):
    run = finished.directory / "results" / "tests"
    base = loading.load_model(run / "base", run / "rope/yarn.json", dtype="fp32", attention="sdpa")
    with torch.no_grad():
        untrained = base(IDS).logits
        adapted = PeftModel.from_pretrained(base, run / "trained").eval()(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "merged")(IDS).logits
    assert merged.dtype == torch.float32
    assert (merged - adapted).abs().max() <= 1e-4
    assert (merged - untrained).abs().max() > 1e-3  # the adapter does something


def test_merged_directory_loads_alone_and_carries_its_rope(finished):
    run = finished.directory / "results" / "tests"
    rope = RopeRecord.read(run / "rope/yarn.json")
    model = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert model.config.rope_parameters == rope.rope_parameters
    assert model.config.max_position_embeddings == 1024
    rope.check_model(model)
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    assert tokenizer.model_max_length == 1024
    with open(run / "merged/model.safetensors", "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        assert "format" in json.loads(file.read(size))["__metadata__"]


def small_base(directory, tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, num_attention_heads=2, num_hidden_layers=3,
        intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory / "base", max_shard_size="20KB")
    write_manifest(directory, "base", {"trust_remote_code": False, "source": "x", "revision": None})
    settings = {"method": "linear", "target_length": 128, "write_config": True}
    command = [sys.executable, ROOT / "scripts/patch_rope.py", "--base", directory / "base.json"]
    command += ["--settings", json.dumps(settings), "--manifest", directory / "rope.json"]
    subprocess.run([*command, "--output", directory / "rope"], check=True)


def write_manifest(directory, name, facts):
    files = sorted((directory / name).iterdir())
    manifest.write(
        directory / f"{name}.json",
        script=ROOT / "scripts" / "merge.py",
        settings={},
        inputs={},
        files=files,
        facts={"directory": name, "bytes": sum(f.stat().st_size for f in files)} | facts,
    )


def adapt(directory, **settings):
    """Save an adapter with random weights and return the adapted model's logits."""
    base = loading.load_model(
        directory / "base", directory / "rope.json", dtype="fp32", attention="sdpa"
    )
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", **settings))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            change = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + change
    adapted.save_pretrained(directory / "trained")
    write_manifest(directory, "trained", {"mode": "lora"})
    with torch.no_grad():
        return adapted.eval()(IDS).logits


def arguments_of(directory) -> list:
    command = ["--threads", "1", "--work", directory / "work"]
    for name in ("base", "rope"):
        command += [f"--{name}", directory / f"{name}.json"]
    command += ["--train", directory / "trained.json", "--manifest", directory / "merged.json"]
    return [*command, "--output", directory / "merged"]


def merge(directory, *more):
    command = [sys.executable, ROOT / "scripts/merge.py", *arguments_of(directory), *more]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (True, {"r": 4, "lora_alpha": 8}),
        (False, {"r": 4, "lora_alpha": 8, "use_rslora": True}),
        (False, {"r": 2, "lora_alpha": 1, "modules_to_save": ["embed_tokens", "norm", "lm_head"]}),
        (True, {"r": 2, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
)
def test_shards_and_kinds_of_adapters(tmp_path, tied, settings):
    small_base(tmp_path, tied)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    expected = adapt(tmp_path, **settings)
    done = merge(tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    assert (merged - expected).abs().max() <= 1e-4
    names = {file.name for file in (tmp_path / "base").iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == names


def test_an_adapter_of_another_model_is_refused(tmp_path):
    small_base(tmp_path, True)
    adapt(tmp_path, r=4)
    path = tmp_path / "trained" / "adapter_model.safetensors"
    renamed = {k.replace("layers.2", "layers.7"): v for k, v in load_file(path).items()}
    save_file(renamed, path)
    write_manifest(tmp_path, "trained", {"mode": "lora"})
    done = merge(tmp_path)
    assert done.returncode == 1
    assert "it was trained on another model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.json").exists()


def test_a_bfloat16_base_gets_the_rounded_float32_sum(tmp_path, monkeypatch):
    """To the bit, and a block at a time: not the sum of a bfloat16 delta."""
    monkeypatch.setattr(tensorfile, "ELEMENTS", 64 * 10)
    torch.manual_seed(0)
    tensors = {"w.weight": torch.randn(64, 64).bfloat16(), "same": torch.randn(7).bfloat16()}
    save_file(tensors, tmp_path / "base.safetensors", {"format": "pt"})
    a, b = torch.randn(8, 64), torch.randn(64, 8)
    save_file({"a": a, "b": b}, tmp_path / "adapter.safetensors")
    places = tensorfile.header(tmp_path / "adapter.safetensors")
    change = functools.partial(
        lora_files.load_sum, tmp_path / "adapter.safetensors", places["a"], places["b"], 0.01
    )
    target = tmp_path / "merged.safetensors"
    file = tmp_path / "base.safetensors"
    merging.Merge({"w.weight": change}, tensorfile.tensors([file]), None).write(file, target)
    found = load_file(target)
    exact = tensors["w.weight"].double() + 0.01 * (b.double() @ a.double())
    assert torch.equal(found["w.weight"], exact.bfloat16())
    assert torch.equal(found["same"], tensors["same"])


def test_what_was_added_is_the_adapters(tmp_path):
    """The other way round: merged − base has the adapter's values, and its rank."""
    small_base(tmp_path, False)
    adapt(tmp_path, r=4, lora_alpha=8)
    assert merge(tmp_path).returncode == 0
    before, after = load_all(tmp_path / "base"), load_all(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == adapted_names(tmp_path)
    for name in changed:
        added = after[name].double() - before[name].double()
        torch.testing.assert_close(added, delta_of(tmp_path, name).double(), atol=1e-6, rtol=0)
        sizes = torch.linalg.svdvals(added)
        assert sizes[4] < 1e-5 * sizes[0] < sizes[3]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_cast_to_another_type(tmp_path, dtype):
    small_base(tmp_path, True)
    expected = adapt(tmp_path, r=4)
    done = merge(tmp_path, "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == loading.torch_dtype(dtype)
    with torch.no_grad():
        assert (model(IDS).logits - expected).abs().max() < 0.05 * expected.abs().max()
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in load_all(tmp_path / "merged").values()
    )


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_where_every_weight_was_trained(tmp_path, dtype):
    """In 32 bits, of a bfloat16 base, whose type the merged model has unless another is asked for."""
    small_base(tmp_path, True)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    for parameter in model.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "trained", max_shard_size="40KB")
    write_manifest(tmp_path, "trained", {"mode": "full"})
    to_bfloat16(tmp_path)
    done = merge(tmp_path, *(["--dtype", dtype] if dtype else []))
    assert done.returncode == 0, done.stderr
    before, trained = load_all(tmp_path / "base"), load_all(tmp_path / "trained")
    found, shares = load_all(tmp_path / "merged"), []
    assert found.keys() == trained.keys()
    for name, wanted in trained.items():
        assert torch.equal(found[name], wanted if dtype else wanted.bfloat16())
        change = (wanted - before[name].float()).norm()
        shares.append(float((found[name].float() - wanted).norm() / change))
    error = manifest.read_facts(tmp_path / "merged.json")["merge_error"]
    assert error == pytest.approx(max(shares), rel=1e-4) and (error > 0) == (dtype is None)


def test_numbers_beyond_fp16_are_refused(tmp_path):
    small_base(tmp_path, True)
    adapt(tmp_path, r=4)
    file = next((tmp_path / "base").glob("*1-of*.safetensors"))
    save_file({k: v * 0 + 1e5 for k, v in load_file(file).items()}, file, {"format": "pt"})
    done = merge(tmp_path, "--dtype", "fp16")
    assert done.returncode == 1 and "too large for fp16; set merge.dtype to bf16" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "merged.json").exists()


def to_bfloat16(directory) -> None:
    for file in (directory / "base").glob("*.safetensors"):
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
    write_manifest(directory, "base", {"trust_remote_code": False, "source": "x", "revision": None})


def test_killed_half_way_it_goes_on_to_the_same_model(tmp_path):
    small_base(tmp_path, False)
    adapt(tmp_path, r=4)
    assert merge(tmp_path).returncode == 0
    record = (tmp_path / "merged.json").read_bytes()
    shutil.rmtree(tmp_path / "merged")
    # Killed as a shard's last byte is about to be written under its name.
    code = (
        "import os, sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv[0] = 'merge.py'\n"
        "import merge\nfrom longyarn.core import tensorfile\nwrite, count = tensorfile.write, [0]\n"
        "def counted(*given):\n    count[0] += 1\n"
        "    os._exit(9) if count[0] == 3 else write(*given)\n"
        "tensorfile.write = counted\nmerge.main()\n"
    )
    command = [str(part) for part in arguments_of(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "scripts"), *command])
    assert done.returncode == 9
    assert not (tmp_path / "merged").exists()
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.json")}
    assert len(written) == 3  # two shards and what the work is about
    first, second = sorted((tmp_path / "work").rglob("*.safetensors"))
    first.unlink()  # as scratch file systems do
    second.write_bytes(b"")  # as a node that lost its power leaves it
    done = merge(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged.json").read_bytes() == record
    assert not list((tmp_path / "work").iterdir())


def test_a_disk_that_fills_up(tmp_path):
    """Too small from the start, and while shards are written."""
    small_base(tmp_path, False)
    adapt(tmp_path, r=4)
    unaware = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv[0] = 'merge.py'\n"
        "import merge\nfrom longyarn.core.errors import program\n"
        "merge.require_space = lambda *given: None\nprogram(merge.main)()\n"
    )
    with small_disk(tmp_path / "small", 1) as small:
        filler = small / "filler"
        filler.write_bytes(b"0" * ((1 << 20) - 60_000))
        done = merge(tmp_path, "--work", small)
        assert done.returncode == 1 and "error: no space left for the merged model" in done.stderr
        command = [str(part) for part in (*arguments_of(tmp_path), "--work", small)]
        command = [sys.executable, "-c", unaware, str(ROOT / "scripts"), *command]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "error: no space left on the disk" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.json").exists()
        assert list(small.rglob("*.safetensors")) and not list(small.rglob("*.partial"))
        filler.unlink()
        assert merge(tmp_path, "--work", small).returncode == 0


@pytest.mark.parametrize("tied", [True, False])
def test_what_rounding_took_of_the_change_is_measured(tmp_path, tied):
    """Of a bfloat16 base, by hand over all tensors; a float32 one loses nothing."""
    small_base(tmp_path, tied)
    adapt(tmp_path, r=4, lora_alpha=8)
    assert merge(tmp_path).returncode == 0
    assert manifest.read_facts(tmp_path / "merged.json")["merge_error"] == 0
    exact = load_all(tmp_path / "merged")
    to_bfloat16(tmp_path)
    before, rounded = load_all(tmp_path / "base"), {}
    assert merge(tmp_path).returncode == 0
    for name, new in load_all(tmp_path / "merged").items():
        if name in adapted_names(tmp_path):
            delta = delta_of(tmp_path, name).double()
            wanted = before[name].double() + delta
            rounded[name] = float((new.double() - wanted).norm() / delta.norm())
    assert exact.keys() == before.keys()
    found = manifest.read_facts(tmp_path / "merged.json")["merge_error"]
    assert 0 < found < 1 and found == pytest.approx(max(rounded.values()), rel=1e-4)


def load_all(directory) -> dict:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def adapted_names(directory) -> set:
    adapter = load_file(directory / "trained" / "adapter_model.safetensors")
    names = (name for name in adapter if ".lora_A" in name)
    return {name.removeprefix("base_model.model.").replace(".lora_A", "") for name in names}


def delta_of(directory, name) -> torch.Tensor:
    adapter = load_file(directory / "trained" / "adapter_model.safetensors")
    stem = "base_model.model." + name.removesuffix(".weight")
    return adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"] * 2  # 8 / 4
