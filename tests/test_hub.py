"""The hub of the tests: the real clients must find in it what they find in the real one.

And the whole chain with a model in shards that comes from it.
"""

import json
import os
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from huggingface_hub import constants
from stages import MICRO_BASE, write_mix

SNAPSHOT = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], revision=sys.argv[2], cache_dir=sys.argv[3]))
"""

STREAM = """
import json, sys
from datasets import load_dataset
for row in load_dataset(sys.argv[1], revision=sys.argv[2], split="train", streaming=True):
    print(json.dumps(row))
"""


@pytest.fixture
def tree(tmp_path):
    """A directory with a small file, one in a folder, and one large enough for several pieces."""
    directory = tmp_path / "tree"
    (directory / "folder").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "folder" / "note.txt").write_text("A note, naïve.")
    (directory / "weights.safetensors").write_bytes(os.urandom(300_000))
    return directory


def client(hub, tmp_path, code, *arguments, token=None, check=True, **variables):
    """Run a program of the real client; return its lines."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment | hub.environment(tmp_path / "home", token) | variables,
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.splitlines() if check else done


def contents(directory):
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


def test_a_snapshot_by_commit_and_by_branch(hub, tmp_path, tree):
    repository = hub.model("an/model", tree)
    hub.page = 2
    for revision in (repository.commit, "main"):
        lines = client(hub, tmp_path, SNAPSHOT, "an/model", revision, tmp_path / revision)
        assert lines[-1].endswith(f"snapshots/{repository.commit}")
        assert contents(ROOT / lines[-1]) == contents(tree)
    assert any("cursor=2" in request.path for request in hub.requests)


def test_a_cut_is_resumed_where_it_was(hub, tmp_path, tree):
    """The client keeps what came in whole pieces of its own, of 10 MiB."""
    piece = constants.DOWNLOAD_CHUNK_SIZE
    (tree / "weights.safetensors").write_bytes(os.urandom(1 << 20) * 12)
    repository = hub.model("an/model", tree)
    hub.cut("weights.safetensors", after=piece + 1000)
    lines = client(hub, tmp_path, SNAPSHOT, "an/model", repository.commit, tmp_path / "cache")
    assert contents(ROOT / lines[-1]) == contents(tree)
    first, second = hub.asked("weights.safetensors")
    assert (first.range, first.sent) == (None, piece + 1000)
    assert second.range == f"bytes={piece}-"
    assert hub.sent("weights.safetensors") == (12 << 20) + 1000


def test_access(hub, tmp_path, tree):
    private = hub.model("a/private", tree, private=True, readers=("mine",))
    gated = hub.model("a/gated", tree, gated=True, readers=("mine",))
    hub.tokens.add("other")
    for name, commit in (("a/private", private.commit), ("a/gated", gated.commit)):
        for token in (None, "other", "unknown"):
            done = client(
                hub, tmp_path, SNAPSHOT, name, commit, tmp_path / "cache", token=token, check=False
            )
            assert done.returncode
        client(hub, tmp_path, SNAPSHOT, name, commit, tmp_path / "cache", token="mine")
    # The second host never sees the token; it would refuse it.
    assert all(not request.token for request in hub.requests if request.path.startswith("/cdn"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_dataset_is_streamed(hub, tmp_path, kind, cut):
    rows = [{"text": f"Document {number}. " * 200} for number in range(60)]
    directory = tmp_path / "data"
    directory.mkdir()
    file = directory / f"train.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=10)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    repository = hub.dataset("a/corpus", directory)
    if cut:
        hub.cut(file.name, after=file.stat().st_size // 2)
    lines = client(hub, tmp_path, STREAM, "a/corpus", repository.commit)
    assert [json.loads(line) for line in lines] == rows


def test_the_chain_with_a_sharded_model_from_the_hub(hub, workspace, tmp_path, monkeypatch):
    """A branch, a connection that is cut, files of three formats, and every stage to the report."""
    from transformers import LlamaForCausalLM

    from longyarn.core import manifest

    source = tmp_path / "repository"
    LlamaForCausalLM.from_pretrained(MICRO_BASE).save_pretrained(source, max_shard_size="1MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MICRO_BASE / name, source)
    shards = sorted(file.name for file in source.glob("model-*.safetensors"))
    assert len(shards) > 2
    repository = hub.model("an/model", source, gated=True, readers=("hf_mine",))
    hub.cut(shards[1], after=1000)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    for name, value in hub.environment(tmp_path / "home", "hf_mine").items():
        monkeypatch.setenv(name, value)
    overrides = {
        "model": {"source": "an/model", "revision": "main", "disclosure": None},
        "paths": {"cache": "cache"},
        "corpus": write_mix(workspace.directory / "texts"),
        "training": {"steps": 2, "held_out_steps": None},
    }
    done = workspace.snakemake("results/tests/report.json", overrides=overrides)
    results = workspace.directory / "results" / "tests"
    assert "model.revision main of an/model is commit" in done.stdout
    assert len(hub.asked(shards[1])) == 2
    record = manifest.read(results / "base.json")
    assert record["facts"]["revision"] == repository.commit
    assert [name for name in record["files"] if "model-" in name] == [f"base/{n}" for n in shards]
    merged = manifest.read(results / "merged.json")
    assert [name for name in merged["files"] if "model-" in name] == [f"merged/{n}" for n in shards]
    written = json.loads((results / "merged" / "config.json").read_text())
    assert written["rope_parameters"]["factor"] == 2
    report = json.loads((results / "report.json").read_text())
    assert report["mix"]["checked"] and report["chain"]["broken"] == 0
    assert set(report["perplexity"]) == {"base", "yarn", "trained"}
    assert not list(workspace.directory.rglob("*.incomplete"))
    assert "hf_mine" not in done.stdout + "".join(p.read_text() for p in results.glob("*.json"))
