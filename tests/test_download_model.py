"""The stage download_model: what it takes, how it checks it, and what it says when it cannot."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file
from stages import MICRO_BASE, bring, edit_json, one_sentence, refusal, run, small_disk

import download_model
from longyarn import manifest

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the micro base model that a test may spoil."""
    return Path(shutil.copytree(MICRO_BASE, tmp_path / "model"))


# All that a run needs of the micro base; its card and its training log stay behind.
NEEDED = sorted(
    f"base/{file.name}"
    for file in MICRO_BASE.iterdir()
    if file.name not in ("README.md", "training.json")
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
    assert record["files"]["base/model.safetensors"]["sha256"] == manifest.sha256(original)
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
        assert "free some or move the results to another disk" in sentence
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
    assert "is not a directory; mend the path" in refused(tmp_path / "nowhere", tmp_path)


def test_a_file_where_a_directory_should_be(model, tmp_path):
    assert "is not a directory; mend the path" in refused(model / "config.json", tmp_path)


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


# The hub: its real client, talking to a server of ours.


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as the client asks for one repository at one revision."""

    files: dict[str, bytes]

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def log_message(self, *arguments):
        pass

    def answer(self):
        path = self.path.partition("?")[0]
        if "gated/model" in path and "/resolve/" in path:  # its record is public
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "no/model" in path:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if REVISION not in path:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if "/resolve/" in path:
            name = path.rpartition("/")[2]
            content = self.files.get(name)
            if content is None:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.send(200, content, {"ETag": f'"{name}"', "X-Repo-Commit": REVISION})
        answer = self.tree() if "/tree/" in path else self.info()
        return self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def checksum(self, name: str, key: str) -> dict:
        """Return what the hub says of a large file; small ones have no SHA-256 there."""
        if not name.endswith(".safetensors"):
            return {}
        return {"lfs": {key: self.promised, "size": len(self.files[name]), "pointerSize": 1}}

    def info(self) -> dict:
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": name,
                **self.checksum(name, "sha256"),
            }
            for name, content in self.files.items()
        ]
        return {"id": "an/model", "sha": REVISION, "siblings": siblings, "private": False}

    def tree(self) -> list[dict]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": name}
            | self.checksum(name, "oid")
            for name, content in self.files.items()
        ]

    def send(self, status, content, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub():
    """Serve the micro base model as an/model; give its address and the handler's class."""
    handler = type("Handler", (Hub,), {})
    handler.files = {p.name: p.read_bytes() for p in MICRO_BASE.iterdir()}
    handler.files["model.bin"] = b"not wanted"
    handler.promised = manifest.sha256(MICRO_BASE / "model.safetensors")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def from_hub(address: str, directory: Path, source="an/model", revision=REVISION):
    """Run the stage in its own process, because the client reads the hub's address at import."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(directory)}
    return subprocess.run(
        [
            sys.executable, ROOT / "scripts" / "download_model.py", "--source", source,
            "--revision", revision, "--cache", directory / "cache",
            "--manifest", directory / "base.json", "--output", directory / "base",
        ],
        env=environment | {"no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
    )  # fmt: skip


def hub_refusal(done) -> str:
    """Return the sentence after the client's progress bar."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return one_sentence(done.stderr.strip().splitlines()[-1])


def test_a_model_from_the_hub(hub, tmp_path):
    done = from_hub(hub.address, tmp_path)
    assert done.returncode == 0, done.stderr
    record = manifest.read(tmp_path / "base.json")
    assert sorted(record["files"]) == NEEDED
    assert record["facts"]["revision"] == REVISION
    weights = tmp_path / "base" / "model.safetensors"
    assert weights.read_bytes() == (MICRO_BASE / "model.safetensors").read_bytes()
    assert not weights.is_symlink()


def test_a_file_that_differs_from_the_hubs_checksum(hub, tmp_path):
    hub.promised = "0" * 64
    sentence = hub_refusal(from_hub(hub.address, tmp_path))
    assert "model.safetensors differs from the hub's SHA-256; run again" in sentence
    assert not (tmp_path / "base.json").exists()
    hub.promised = manifest.sha256(MICRO_BASE / "model.safetensors")
    assert from_hub(hub.address, tmp_path).returncode == 0, "the wrong file was not kept"


def test_the_hub_without_a_revision(tmp_path):
    sentence = refused("an/model", tmp_path)
    assert "model.revision is needed for the hub repository an/model" in sentence
    assert "mistyped directory" in sentence


@pytest.mark.parametrize(
    ("source", "revision", "expected"),
    [
        (
            "gated/model",
            REVISION,
            "accept its licence on its page, then log in with `hf auth login`",
        ),
        ("no/model", REVISION, "the hub has no no/model, or it is private: mend model.source"),
        ("an/model", "f" * 40, f"an/model has no revision {'f' * 40}; mend model.revision"),
        (
            "a/path/mistyped",
            REVISION,
            "is neither a directory that exists nor owner/name on the hub",
        ),
    ],
)
def test_what_the_hub_refuses(hub, tmp_path, source, revision, expected):
    assert expected in hub_refusal(from_hub(hub.address, tmp_path, source, revision))


def test_the_hub_is_out_of_reach(tmp_path):
    sentence = hub_refusal(from_hub("http://127.0.0.1:9", tmp_path))
    assert f"the hub did not give an/model at {REVISION}" in sentence
    assert "run `snakemake prefetch` where there is a network" in sentence
