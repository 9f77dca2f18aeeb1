"""Pushing to a hub on this machine with the real client: what arrives, and each refusal in one sentence."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from stages import edit_json, one_sentence

from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.core.files import read_json, sha256, write_json
from longyarn.models.hub_errors import hub_errors

MINE, READER = "hf_mine", "hf_reader"


@pytest.fixture
def made(finished, tmp_path):
    """What a push takes of the finished run: the exported model and the gate."""
    results = finished.directory / "results/tests"
    shutil.copytree(results / "export", tmp_path / "run/export")
    for name in ("export.json", "verified.json"):
        shutil.copy(results / name, tmp_path / "run")
    return tmp_path / "run"


def push(hub, made, repository="me/owl", token=MINE, *more, **variables):
    """Run the stage as its rule does, in a process that asks this hub."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [
        sys.executable, ROOT / "scripts/push.py", "--export", made / "export.json",
        "--gate", made / "verified.json", "--repository", repository, *more,
        "--manifest", made / "push.json",
    ]  # fmt: skip
    return subprocess.run(
        list(map(str, command)),
        env=environment | hub.environment(made / "home", token) | variables,
        capture_output=True,
        text=True,
    )


def pushed(hub, made, *given) -> str:
    """Push, and return the commit that the manifest has."""
    done = push(hub, made, *given)
    assert done.returncode == 0, done.stderr
    record = manifest.read(made / "push.json")
    assert record["inputs"]["export"] == sha256(made / "export.json")
    assert record["facts"]["repository"] == "me/owl"
    assert record["facts"]["commit"] in done.stderr
    return record["facts"]["commit"]


def download(hub, commit: str, directory, token=MINE):
    """Download a commit with the real client; return its files by name."""
    program = (
        "import sys, huggingface_hub as h; h.snapshot_download('me/owl', revision=sys.argv[1],"
        " local_dir=sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", program, commit, str(directory)],
        env=os.environ | hub.environment(directory.parent / "reader", token),
        check=True,
        capture_output=True,
    )
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def refused(hub, made, *given, **variables) -> str:
    """Push what must be refused; return its one sentence."""
    done = push(hub, made, *given, **variables)
    assert done.returncode == 1 and not (made / "push.json").exists(), done.stderr
    return one_sentence(done.stderr)


def test_what_arrives_is_what_was_exported_in_one_commit(hub, made, tmp_path):
    """Private, byte for byte; and nothing changed is no failure, and no commit."""
    hub.allow(MINE, "me")
    commit = pushed(hub, made, "me/owl", MINE, "--private")
    repository = hub.repositories["models", "me/owl"]
    assert repository.private and repository.commit == commit
    assert len(repository.commits) == 2  # the empty one that a new repository has, and ours
    wanted = {file.name: file.read_bytes() for file in (made / "export").glob("[!.]*")}
    assert download(hub, commit, tmp_path / "there") == wanted
    assert "model.safetensors" in wanted and "README.md" in wanted
    sent = len(hub.uploaded)
    assert pushed(hub, made) == commit
    assert len(repository.commits) == 2 and len(hub.uploaded) == sent


def test_a_push_to_a_model_that_is_there(hub, made, tmp_path):
    """It stays as public as it was; weights of an earlier model go, and other files stay."""
    hub.allow(MINE, "me")
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.md"):
        (earlier / name).write_bytes(b"earlier")
    repository = hub.model("me/owl", earlier)
    pushed(hub, made, "me/owl", MINE, "--private")
    names = set(repository.commits[repository.commit])
    assert not repository.private
    assert names == {file.name for file in (made / "export").glob("[!.]*")} | {"notes.md"}


def test_each_refusal_is_one_sentence(hub, made):
    hub.allow(MINE, "me")
    hub.allow(READER)
    assert "export.repository is null" in refused(hub, made, "")
    assert "there is no token to push to me/owl;" in refused(hub, made, "me/owl", None)
    for owner, token in (("other", MINE), ("me", READER), ("me", "hf_made_up")):
        sentence = refused(hub, made, f"{owner}/owl", token)
        assert f"does not let this token write to {owner}/owl" in sentence
    assert "is not a name that the hub accepts" in refused(hub, made, "me/a--owl")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "the hub is out of reach" in refused(hub, made, "me/owl", MINE, **nowhere)
    assert not hub.repositories


def test_a_card_that_the_hub_does_not_take_is_refused_before_anything_is_sent(hub, made):
    hub.allow(MINE, "me")
    card = made / "export/README.md"
    card.write_text(card.read_text().replace("model-index:", "model-index: [", 1))
    record = read_json(made / "export.json")
    record["files"]["export/README.md"]["size"] = card.stat().st_size
    write_json(made / "export.json", record)
    assert "the hub does not accept the model card" in refused(hub, made)
    assert not hub.uploaded


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError("the write timed out"), "the hub is out of reach"),
        (PermissionError("token refused"), "the hub does not let this token write to me/owl"),
        (ValueError("Expecting value"), "the hub did not accept me/owl"),
    ],
)
def test_what_the_hubs_client_raises_besides_is_said_of_the_hub(error, words):
    """hf_xet raises PermissionError without a number for a token; one of the disk stays the disk's."""
    with (
        pytest.raises(UserError, match=words),
        hub_errors("me/owl", "export.repository", write=True),
    ):
        raise error
    with pytest.raises(PermissionError), hub_errors("me/owl", "export.repository", write=True):
        raise PermissionError(13, "Permission denied")


def test_the_gate_of_another_model_is_refused(hub, made):
    edit_json(made / "verified.json", inputs={"merge": "0" * 64})
    assert "belongs to another merged model" in refused(hub, made)
    assert not hub.requests


def test_a_file_that_changed_after_the_export_is_seen(hub, made):
    """The manifest's hashes are compared with what the hub has then."""
    hub.allow(MINE, "me")
    weights = made / "export/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model.safetensors of me/owl" in refused(hub, made)


def test_a_small_file_that_changed_after_the_export_is_seen(hub, made):
    """Outside LFS too, where the size is the same."""
    hub.allow(MINE, "me")
    settings = made / "export/generation_config.json"
    settings.write_text(settings.read_text().replace("0", "1"))
    assert "generation_config.json of me/owl" in refused(hub, made)


def test_through_snakemake(hub, finished_copy, monkeypatch):
    """`snakemake push` runs push alone after a finished run, and stops at once without a repository."""
    hub.allow(MINE, "me")
    for key, value in hub.environment(finished_copy.directory / "home", MINE).items():
        monkeypatch.setenv(key, value)
    overrides = {"export": {"repository": "me/owl"}}
    assert finished_copy.planned(overrides, "push") == {"push": 1}
    finished_copy.snakemake("push", overrides=overrides)
    record = manifest.read(finished_copy.directory / "results/tests/push.json")
    assert record["facts"]["commit"] == hub.repositories["models", "me/owl"].commit
    assert hub.repositories["models", "me/owl"].private
    done = finished_copy.snakemake("push", overrides={"export": {"repository": None}}, check=False)
    assert done.returncode == 1 and "error: export.repository is null" in done.stdout
    assert "localrule push" not in done.stdout
