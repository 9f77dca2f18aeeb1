"""The stage download_model: what it takes, how it checks it, and what it says when it cannot."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file
from stages import MICRO_BASE, bring, edit_json, one_sentence, refusal, run, small_disk
from transformers import LlamaForCausalLM

import download_model
from longyarn.core import manifest
from longyarn.core.files import sha256


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the micro base model that a test may spoil."""
    return Path(shutil.copytree(MICRO_BASE, tmp_path / "model"))


# All that a run needs of the micro base; its card and its training log stay behind.
NEEDED = sorted(
    f"base/{file.name}"
    for file in MICRO_BASE.iterdir()
    if file.is_file() and file.name not in ("README.md", "training.json")
)


def refused(model, tmp_path) -> str:
    """Return the sentence for a bad model directory; nothing may be left in the run's directory."""
    sentence = refusal(
        download_model, "--source", model, "--cache", tmp_path / "cache",
        "--manifest", tmp_path / "run" / "base.json", "--output", tmp_path / "run" / "base",
    )  # fmt: skip
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    return sentence


def sharded(model: Path) -> Path:
    """Split a model's weights into two shards with an index; return the second shard."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / shard)
        weight_map |= dict.fromkeys(part, shard)
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model / shard


def test_a_local_model_is_linked_and_listed(model, tmp_path):
    (model / "code.py").write_text("raise SystemExit")
    (model / "pytorch_model.bin").write_bytes(b"not wanted")
    record = manifest.read(bring(model, tmp_path / "run"))
    assert sorted(record["files"]) == NEEDED
    original, brought = model / "model.safetensors", tmp_path / "run" / "base" / "model.safetensors"
    assert os.path.samefile(original, brought)
    assert record["files"]["base/model.safetensors"]["sha256"] == sha256(original)
    assert record["facts"]["model_type"] == "llama"
    assert record["facts"]["bytes"] == sum(
        (MICRO_BASE.parent / name.replace("base/", "micro-base/")).stat().st_size for name in NEEDED
    )
    assert str(tmp_path) not in json.dumps(record["files"])


def test_code_comes_along_only_when_it_is_trusted(model, tmp_path):
    (model / "code.py").write_text("raise SystemExit")
    run(
        download_model, "--source", model, "--trust-remote-code", "--cache", tmp_path,
        "--manifest", tmp_path / "base.json", "--output", tmp_path / "base",
    )  # fmt: skip
    record = manifest.read(tmp_path / "base.json")
    assert "base/code.py" in record["files"]
    assert record["facts"]["trust_remote_code"] is True


def test_code_of_another_repository_is_refused(model, tmp_path):
    """transformers would fetch it anew in each stage, from whatever revision is there that day."""
    edit_json(model / "config.json", auto_map={"AutoModel": "owner/name--modeling.Model"})
    bring(model, tmp_path / "untrusted")  # never asked for
    sentence = refusal(
        download_model, "--source", model, "--trust-remote-code", "--cache", tmp_path,
        "--manifest", tmp_path / "base.json", "--output", tmp_path / "base",
    )  # fmt: skip
    assert "names code of another repository, owner/name--modeling.Model" in sentence
    assert "copy that code beside the model and write modeling.Model" in sentence
    assert not (tmp_path / "base").exists()


def test_a_model_on_another_disk_is_copied(model, tmp_path):
    with small_disk(tmp_path / "disk", 16) as disk:
        bring(model, disk)
        brought = disk / "base" / "model.safetensors"
        assert not os.path.samefile(brought, model / "model.safetensors")
        assert brought.read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_full_disk_is_noticed_before_anything_is_copied(model, tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        sentence = refusal(
            download_model, "--source", model, "--cache", tmp_path / "cache",
            "--manifest", disk / "base.json", "--output", disk / "base",
        )  # fmt: skip
        assert "no space left for the base model" in sentence
        assert "free some space, or move the results to another disk" in sentence
        assert list(disk.iterdir()) == []


def test_a_linked_model_needs_no_space(model, tmp_path):
    """On the model's own disk files are linked, so a disk that is nearly full is no reason to stop."""
    with small_disk(tmp_path / "disk", 8) as disk:
        source = Path(shutil.copytree(model, disk / "model"))
        assert shutil.disk_usage(disk).free < (model / "model.safetensors").stat().st_size
        bring(source, disk / "run")
        assert (disk / "run" / "base.json").is_file()


def test_a_sharded_model_is_whole(model, tmp_path):
    sharded(model)
    record = manifest.read(bring(model, tmp_path / "run"))
    assert "base/model-00002-of-00002.safetensors" in record["files"]
    assert "base/model.safetensors.index.json" in record["files"]


def test_a_missing_directory(tmp_path):
    assert "is not a directory; correct the path" in refused(tmp_path / "nowhere", tmp_path)


def test_a_file_where_a_directory_should_be(model, tmp_path):
    assert "is not a directory; correct the path" in refused(model / "config.json", tmp_path)


def test_no_config(model, tmp_path):
    (model / "config.json").unlink()
    assert "has no config.json; model.source must name a model dir" in refused(model, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_broken_json_file(model, tmp_path, name):
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[: len(content) // 2])
    sentence = refused(model, tmp_path)
    assert f"{model / name} is not valid JSON" in sentence
    assert "restore" in sentence


def test_a_config_that_is_a_list(model, tmp_path):
    (model / "config.json").write_text("[]")
    assert f"{model / 'config.json'} is not a JSON object; restore" in refused(model, tmp_path)


def test_no_safetensors(model, tmp_path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "has no model.safetensors; Longyarn loads safetensors only" in refused(model, tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 100_000])
def test_truncated_safetensors(model, tmp_path, keep):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    sentence = refused(model, tmp_path)
    assert f"{file} is not a whole safetensors file" in sentence
    assert "download it again" in sentence


def test_safetensors_that_are_something_else(model, tmp_path):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 9)
    assert "is not a whole safetensors file" in refused(model, tmp_path)


def test_a_missing_shard(model, tmp_path):
    shard = sharded(model)
    shard.unlink()
    assert f"{shard}, named in the index, is missing" in refused(model, tmp_path)


def test_a_truncated_shard(model, tmp_path):
    shard = sharded(model)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} is not a whole safetensors file" in refused(model, tmp_path)


def test_an_index_without_its_map(model, tmp_path):
    sharded(model)
    edit_json(model / "model.safetensors.index.json", weight_map=...)
    assert "has no weight_map; restore it" in refused(model, tmp_path)


# Only what is needed.


def test_tensors_that_are_published_twice(model, tmp_path):
    """Mistral's repositories hold all tensors once more, as consolidated.safetensors."""
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    record = manifest.read(bring(model, tmp_path / "run"))
    assert sorted(record["files"]) == NEEDED


def test_an_index_that_leads_elsewhere(model, tmp_path):
    sharded(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    moved = dict.fromkeys(index["weight_map"], "../other/model.safetensors")
    edit_json(model / "model.safetensors.index.json", weight_map=moved)
    assert "names ../other/model.safetensors, which is not beside it" in refused(model, tmp_path)


# The hub: its real client, talking to the server of tests/hub.


@pytest.fixture
def shards(tmp_path) -> Path:
    """The micro base in shards, with much beside it that a run does not need."""
    directory = tmp_path / "repository"
    LlamaForCausalLM.from_pretrained(MICRO_BASE).save_pretrained(directory, max_shard_size="1MB")
    for file in MICRO_BASE.iterdir():
        wanted = file.is_file() and file.name != "model.safetensors"
        if wanted and not (directory / file.name).exists():
            shutil.copy(file, directory)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "code.py"):
        (directory / name).write_bytes(b"not wanted")
    for name in ("original", "onnx"):
        (directory / name).mkdir()
        (directory / name / "config.json").write_text("{}")
        (directory / name / "model.safetensors").write_bytes(b"not wanted")
    return directory


@pytest.fixture
def repository(hub, shards):
    """The repository an/model on the hub of the test."""
    return hub.model("an/model", shards)


def environment(hub, directory: Path, token: str | None = None, **more) -> dict[str, str]:
    """Return the environment of a user with nothing but this hub and, perhaps, a token."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return clean | hub.environment(directory / "home", token) | more


def command(directory: Path, revision: str, source: str = "an/model") -> list:
    return [
        sys.executable, ROOT / "scripts" / "download_model.py", "--source", source,
        *(["--revision", revision] if revision else []), "--cache", directory / "cache",
        "--manifest", directory / "run" / "base.json", "--output", directory / "run" / "base",
    ]  # fmt: skip


def from_hub(hub, directory: Path, revision: str, source="an/model", token=None, **variables):
    """Run the stage in its own process, because the client reads the hub's address at import."""
    return subprocess.run(
        command(directory, revision, source),
        env=environment(hub, directory, token, **variables),
        capture_output=True,
        text=True,
    )


def hub_refusal(done, directory: Path) -> str:
    """Return the sentence after the client's progress bar; nothing may be left of an output."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not list((directory / "run").glob("*"))
    assert not list((directory / "cache").rglob("*.incomplete"))
    return one_sentence(done.stderr.strip().splitlines()[-1])


def tensors(directory: Path) -> list[Path]:
    """Return the shards of a model, in order."""
    return sorted(directory.glob("model-*.safetensors"))


def check(directory: Path, repository: Path, commit: str) -> dict:
    """Make sure that a run has what the repository has, and nothing that is not needed."""
    record = manifest.read(directory / "run" / "base.json")
    brought = directory / "run" / "base"
    assert {file.name for file in brought.iterdir()} == {
        name.removeprefix("base/") for name in NEEDED if name != "base/model.safetensors"
    } | {file.name for file in tensors(repository)} | {"model.safetensors.index.json"}
    for file in brought.iterdir():
        assert file.read_bytes() == (repository / file.name).read_bytes()
        assert not file.is_symlink()
    assert record["facts"]["revision"] == commit
    return record


def test_a_sharded_model_from_the_hub(hub, repository, shards, tmp_path):
    assert len(tensors(shards)) > 2
    done = from_hub(hub, tmp_path, repository.commit)
    assert done.returncode == 0, done.stderr
    record = check(tmp_path, shards, repository.commit)
    assert str(tmp_path) not in json.dumps(record)
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "code.py", "README.md"):
        assert not hub.asked(unwanted)
    assert not hub.asked("original/model.safetensors")
    for file in tensors(shards):
        assert hub.sent(file.name) == file.stat().st_size
    # Once more: nothing is sent again, and the manifest is the same.
    first = (tmp_path / "run" / "base.json").read_bytes()
    hub.requests.clear()
    assert from_hub(hub, tmp_path, repository.commit).returncode == 0
    assert not any(request.sent for request in hub.requests if request.file)
    assert (tmp_path / "run" / "base.json").read_bytes() == first


def test_a_model_in_one_file_from_the_hub(hub, tmp_path):
    commit = hub.model("an/model", MICRO_BASE).commit
    done = from_hub(hub, tmp_path, commit)
    assert done.returncode == 0, done.stderr
    assert sorted(manifest.read(tmp_path / "run" / "base.json")["files"]) == NEEDED


def test_a_cut_is_mended_within_one_run(hub, repository, shards, tmp_path):
    hub.cut(tensors(shards)[1].name, after=1000)
    done = from_hub(hub, tmp_path, repository.commit)
    assert done.returncode == 0, done.stderr
    assert "Trying to resume download" in done.stderr
    check(tmp_path, shards, repository.commit)


def test_a_connection_that_stays_cut(hub, repository, shards, tmp_path):
    """The client gives up after five attempts; the next run brings only what is missing."""
    cut = tensors(shards)[-1].name
    hub.cut(cut, after=1000, times=100)
    sentence = hub_refusal(from_hub(hub, tmp_path, repository.commit), tmp_path)
    assert (
        f"the hub did not deliver an/model at {repository.commit} (peer closed connection"
        in sentence
    )
    assert "complete files are kept, so run again" in sentence
    hub.heal()
    hub.requests.clear()
    assert from_hub(hub, tmp_path, repository.commit).returncode == 0
    check(tmp_path, shards, repository.commit)
    assert {request.file for request in hub.requests if request.sent and request.file} == {cut}


def test_a_killed_download_keeps_what_came_whole(hub, repository, shards, tmp_path):
    """The last shard comes slowly; once the others are here the process is killed."""
    slow = tensors(shards)[-1]
    hub.slow(slow.name, 0.5)
    process = subprocess.Popen(
        command(tmp_path, repository.commit),
        env=environment(hub, tmp_path),
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    others = [file.name for file in tensors(shards)[:-1]]
    while not all(list((tmp_path / "cache").rglob(name)) for name in others):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    (partial,) = (tmp_path / "cache").rglob("*.incomplete")
    running = partial.with_name("another.incomplete")  # of another run into the same cache
    running.touch()
    os.utime(partial, (time.time() - 4000,) * 2)
    assert not (tmp_path / "run" / "base.json").exists()
    hub.heal()
    hub.requests.clear()
    done = from_hub(hub, tmp_path, repository.commit)
    assert done.returncode == 0, done.stderr
    check(tmp_path, shards, repository.commit)
    assert hub.sent(slow.name) == slow.stat().st_size
    assert not any(hub.asked(name) for name in others)
    assert list((tmp_path / "cache").rglob("*.incomplete")) == [running]


@pytest.mark.parametrize("large", [True, False])
def test_a_corrupted_byte_is_refused_and_can_be_mended(hub, repository, shards, tmp_path, large):
    """A file in LFS has a SHA-256, any other git's own hash."""
    name = tensors(shards)[0].name if large else "tokenizer.json"
    hub.corrupt(name)
    sentence = hub_refusal(from_hub(hub, tmp_path, repository.commit), tmp_path)
    assert f"{name} of an/model differs from the hub's hash and was removed; run" in sentence
    hub.heal()
    done = from_hub(hub, tmp_path, repository.commit)
    assert done.returncode == 0, done.stderr
    check(tmp_path, shards, repository.commit)


@pytest.mark.parametrize("grow", [-7, 7])
def test_a_wrong_size(hub, repository, shards, tmp_path, grow):
    name = tensors(shards)[0].name
    hub.resize(name, grow)
    sentence = hub_refusal(from_hub(hub, tmp_path, repository.commit), tmp_path)
    assert "file should be of size" in sentence
    assert "run again" in sentence


def test_a_file_of_the_cache_that_was_spoilt(hub, repository, shards, tmp_path):
    """Also without a network: the cache keeps the record of the hashes."""
    assert from_hub(hub, tmp_path, repository.commit).returncode == 0
    shutil.rmtree(tmp_path / "run")
    name = tensors(shards)[0].name
    (cached,) = (tmp_path / "cache").rglob(name)
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.resolve().write_bytes(content)
    done = from_hub(hub, tmp_path, repository.commit, HF_HUB_OFFLINE="1")
    assert f"{name} of an/model differs from the hub's hash" in hub_refusal(done, tmp_path)
    done = from_hub(hub, tmp_path, repository.commit, HF_HUB_OFFLINE="1")
    assert f"are missing ({name})" in hub_refusal(done, tmp_path)
    assert from_hub(hub, tmp_path, repository.commit).returncode == 0
    check(tmp_path, shards, repository.commit)


@pytest.mark.parametrize("revision", ["commit", "main"])
def test_the_cache_serves_without_a_network(hub, repository, shards, tmp_path, revision):
    commit = repository.commit
    revision = commit if revision == "commit" else revision
    assert from_hub(hub, tmp_path, revision).returncode == 0
    first = (tmp_path / "run" / "base.json").read_bytes()
    hub.requests.clear()
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        shutil.rmtree(tmp_path / "run")
        done = from_hub(hub, tmp_path, revision, **variables)
        assert done.returncode == 0, done.stderr
        assert "the hub is out of reach; an/model is taken from" in done.stderr
        check(tmp_path, shards, commit)
        assert (tmp_path / "run" / "base.json").read_bytes() == first
    assert not hub.requests


def test_a_branch_is_resolved_and_said(hub, repository, shards, tmp_path):
    first = repository.commit
    (shards / "generation_config.json").write_text("{}")
    second = repository.push(shards)
    repository.refs["old"] = first
    assert first != second
    done = from_hub(hub, tmp_path, "main")
    assert done.returncode == 0, done.stderr
    assert f"model.revision main of an/model is commit {second} today" in done.stderr
    record = check(tmp_path, shards, second)
    assert record["settings"]["revision"] == "main"
    assert from_hub(hub, tmp_path, "old").returncode == 0
    assert manifest.read(tmp_path / "run" / "base.json")["facts"]["revision"] == first


def test_the_hub_without_a_revision(tmp_path):
    sentence = refused("an/model", tmp_path)
    assert "model.revision is needed for the hub repository an/model" in sentence
    assert "mistyped directory" in sentence


NOBODY, OTHER, MINE, MADE_UP = None, "hf_other", "hf_mine", "hf_made_up"


@pytest.mark.parametrize(
    ("source", "token", "expected"),
    [
        ("a/gated", NOBODY, "accept its terms on its page, then log in with `hf auth login`"),
        ("a/gated", OTHER, "then wait for access, or use the token of an account that has it"),
        ("a/gated", MADE_UP, "the hub does not accept your token for a/gated; create one"),
        ("a/gated", MINE, None),
        ("a/private", NOBODY, "the hub does not have a/private, or it is private: correct model.source"),
        ("a/private", OTHER, "the hub does not have a/private, or it is private: correct model.source"),
        ("a/private", MINE, None),
        ("no/model", NOBODY, "the hub does not have no/model, or it is private: correct model.source, or"),
        ("a/path/mistyped", NOBODY, "neither an existing directory nor owner/name on the hub"),
    ],
)  # fmt: skip
def test_access(hub, shards, tmp_path, source, token, expected):
    hub.tokens.add(OTHER)
    gated = hub.model("a/gated", shards, gated=True, readers=(MINE,))
    private = hub.model("a/private", shards, private=True, readers=(MINE,))
    commit = private.commit if source == "a/private" else gated.commit
    done = from_hub(hub, tmp_path, commit, source, token)
    if expected:
        assert expected in hub_refusal(done, tmp_path)
        assert not any(hub.sent(file.name) for file in shards.iterdir())
    else:
        assert done.returncode == 0, done.stderr
        check(tmp_path, shards, commit)
        assert token not in (tmp_path / "run" / "base.json").read_text() + done.stderr


@pytest.mark.parametrize("revision", ["f" * 40, "no-such-branch"])
def test_a_revision_that_is_not_there(hub, repository, tmp_path, revision):
    sentence = hub_refusal(from_hub(hub, tmp_path, revision), tmp_path)
    assert f"an/model has no revision {revision} on the hub; correct model.revision" in sentence


def test_a_repository_without_safetensors(hub, shards, tmp_path):
    for file in [*tensors(shards), shards / "model.safetensors.index.json"]:
        file.unlink()
    repository = hub.model("an/model", shards)
    sentence = hub_refusal(from_hub(hub, tmp_path, repository.commit), tmp_path)
    assert "has no model.safetensors; Longyarn loads safetensors only" in sentence
    assert not any(request.sent for request in hub.requests if request.file)


def test_a_repository_without_a_shard_or_a_config(hub, shards, tmp_path):
    shard = tensors(shards)[1]
    shard.unlink()
    repository = hub.model("an/model", shards)
    sentence = hub_refusal(from_hub(hub, tmp_path, repository.commit), tmp_path)
    assert f"lacks {shard.name}, which its index names; choose another revision" in sentence
    (shards / "config.json").unlink()
    commit = repository.push(shards)
    sentence = hub_refusal(from_hub(hub, tmp_path, commit), tmp_path)
    assert "has no config.json, so transformers cannot load it" in sentence


def test_the_hub_is_out_of_reach(hub, tmp_path):
    done = from_hub(hub, tmp_path, "0" * 40, HF_ENDPOINT="http://127.0.0.1:9")
    sentence = hub_refusal(done, tmp_path)
    assert f"the hub did not deliver an/model at {'0' * 40}" in sentence
    assert "run `snakemake prefetch` on a machine with a network" in sentence
