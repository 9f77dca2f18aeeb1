"""The stage tokenise: bos and eos around each document, held-out documents, clear errors."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file
from stages import MICRO_BASE, bring, edit_json, refusal, run, small_disk
from transformers import AutoTokenizer

import tokenise
from longyarn.core import manifest, tensorfile
from longyarn.data import chat_templates, token_workers
from longyarn.data.token_store import DUPLICATE, HELD_OUT, TRAINING, Tokens

TEXTS = {
    "books/one": "Now is the winter of our discontent\n",
    "books/two": "Made glorious summer by this sun of York;\n" * 3,
    "books/three": "And all the clouds that lour'd upon our house\n" * 2,
}
TALK = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is the sun?"},
    {"role": "assistant", "content": "A star."},
    {"role": "user", "content": "And the moon?"},
    {"role": "assistant", "content": "No star."},
]


@pytest.fixture
def inputs(tmp_path):
    """A downloaded base model and a corpus of three documents."""
    shutil.copytree(MICRO_BASE, tmp_path / "model")
    bring(tmp_path / "model", tmp_path)
    write_corpus(tmp_path, [{"id": name, "text": text} for name, text in TEXTS.items()])
    return tmp_path


def write_corpus(directory, documents: list[dict], shards: int = 1) -> None:
    (directory / "corpus").mkdir(exist_ok=True)
    for number in range(shards):
        lines = [json.dumps(document, ensure_ascii=False) for document in documents[number::shards]]
        path = directory / "corpus" / f"documents-{number:05}.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    list_corpus(directory)


def list_corpus(directory) -> None:
    manifest.write(
        directory / "corpus.json",
        script=tokenise.__file__,
        settings={},
        inputs={},
        files=sorted((directory / "corpus").iterdir()),
        facts={"documents": len(TEXTS)},
    )


def arguments(directory, *held_out, **more) -> list:
    options = [
        part for key, value in more.items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    return [
        "--base", directory / "base.json", "--corpus", directory / "corpus.json",
        "--held-out", *held_out, "--work", directory / "work", *options,
        "--manifest", directory / "tokens.json", "--output", directory / "tokens",
    ]  # fmt: skip


def refused(directory, *held_out, **more) -> str:
    """Return the error message of the stage; check that no output is left."""
    sentence = refusal(tokenise, *arguments(directory, *held_out, **more))
    assert not (directory / "tokens").exists()
    assert not (directory / "tokens.json").exists()
    return sentence


def change_model(directory, name: str, content: str) -> None:
    """Change a file of the model and download the model again."""
    (directory / "model" / name).unlink()
    (directory / "model" / name).write_text(content)
    bring(directory / "model", directory)


def test_documents_lie_between_bos_and_eos(inputs):
    run(tokenise, *arguments(inputs, "books/two"))
    facts = manifest.read(inputs / "tokens.json")["facts"]
    tokens = Tokens(inputs / "tokens.json")
    tokenizer = AutoTokenizer.from_pretrained(MICRO_BASE)
    assert len(tokens) == facts["documents"] == 3
    for number, (name, text) in enumerate(TEXTS.items()):
        piece = tokens.tokens(number)
        assert piece.dtype == np.int32 and len(piece) == tokens.lengths[number]
        assert piece[0] == tokenizer.bos_token_id
        assert piece[-1] == tokenizer.eos_token_id
        assert piece[1:-1].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokens.tokens(number, 2, 3).tolist() == piece[2:5].tolist()
        assert tokens.id(number) == name
        assert tokens.scored(number) is None
        assert tokens.roles[number] == (HELD_OUT if name == "books/two" else TRAINING)
    assert facts["tokens"] == tokens.lengths.sum()
    assert facts["held_out"] == [{"id": "books/two", "tokens": tokens.lengths[1]}]
    assert facts["tokens_held_out"] == tokens.lengths[1]
    assert facts["collections"] == {"books": {"documents": 3, "tokens": facts["tokens"]}}
    assert facts["dtype"] == "uint16", "two bytes a token, because the vocabulary is small"
    assert list((inputs / "work").iterdir()) == []


def test_what_is_written_in_parts_is_safetensors(tmp_path):
    tensors = {
        "wide": np.arange(5), "empty": np.empty((0, 2), np.uint64), "flags": np.array([True, False]),
        "rows": np.arange(6, dtype=np.uint16).reshape(3, 2),
    }  # fmt: skip
    parts = tensorfile.Stream("U16", (3, 2), (row for row in tensors["rows"]))
    tensorfile.write(tmp_path / "a.safetensors", tensors | {"rows": parts})
    for read in (load_file, tensorfile.read):
        found = read(tmp_path / "a.safetensors")
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and np.array_equal(found[name], tensor), name
    short = tensorfile.Stream("U16", (4, 2), (row for row in tensors["rows"]))
    with pytest.raises(ValueError, match="do not have the stated shapes"):
        tensorfile.write(tmp_path / "b.safetensors", {"rows": short})
    assert not (tmp_path / "b.safetensors").exists()


def test_every_document_is_in_one_unit_whatever_their_size(tmp_path, monkeypatch):
    texts = [f"{number}é" * (1 + number * 37 % 300) for number in range(200)]
    write_corpus(tmp_path, [{"id": f"a/{n}", "text": text} for n, text in enumerate(texts)], 3)
    shards = sorted((tmp_path / "corpus").iterdir())
    for size in (11, 97, 1000, 10**6):
        monkeypatch.setattr(token_workers, "SMALLEST", size)
        monkeypatch.setattr(token_workers, "LARGEST", size)
        units = token_workers.units(shards, tmp_path)
        found = [document["id"] for unit in units for document in token_workers.documents(unit)]
        expected = [f"a/{number}" for shard in range(3) for number in range(shard, 200, 3)]
        assert found == expected, size


def corpus_of_many(directory) -> None:
    """Write a corpus of several units, 3 MB."""
    generator = np.random.default_rng(0)
    words = ["sun", "moon", "winter", "of", "our", "discontent", "York", "\n"]
    documents = [
        {"id": f"{'ab'[n % 2]}/{n}", "text": " ".join(generator.choice(words, 3000))}
        for n in range(250)
    ]
    write_corpus(directory, documents, 2)


def test_workers_make_no_difference(inputs):
    corpus_of_many(inputs)
    made = []
    for workers in (1, 4):
        run(tokenise, *arguments(inputs, "a/0", workers=workers))
        record = (inputs / "tokens.json").read_bytes()
        assert len(list((inputs / "tokens").iterdir())) > 4
        made.append(record)
    assert made[0] == made[1]


def test_a_killed_run_goes_on_where_it_stood(inputs):
    corpus_of_many(inputs)
    command = [sys.executable, ROOT / "scripts/tokenise.py", *arguments(inputs, "a/0")]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL) as process:
        while not (done := list((inputs / "work").glob("*/tokens-*.safetensors"))):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    # The worker ends with the process that started it.
    time.sleep(1)
    done = {path: path.stat().st_mtime_ns for path in (inputs / "work").glob("*/tokens-*")}
    kept = {path.stat().st_ino for path in done if path.suffix == ".safetensors"}
    workers = [pid for pid in os.listdir("/proc") if pid.isdigit() and parent_was(pid, process.pid)]
    assert workers == []
    assert 0 < len(kept) < 4 and not (inputs / "tokens.json").exists()
    run(tokenise, *arguments(inputs, "a/0"))
    linked = {path.stat().st_ino for path in (inputs / "tokens").iterdir()}
    assert kept <= linked, "finished parts are not written again"
    killed = (inputs / "tokens.json").read_bytes()
    run(tokenise, *arguments(inputs, "a/0"))
    assert (inputs / "tokens.json").read_bytes() == killed


def parent_was(pid: str, parent: int) -> bool:
    """Tell whether a process is a worker of this parent, which has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return f"parent_pid={parent}".encode() in file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_held_out_by_number_and_by_name(inputs):
    names = ["a/1", "b/1", "a/2", "a/3", "b/2"]
    write_corpus(inputs, [{"id": name, "text": f"Text of {name}"} for name in names])
    run(tokenise, *arguments(inputs, "b/2", held_out_documents='{"a": 2}'))
    facts = manifest.read(inputs / "tokens.json")["facts"]
    assert [document["id"] for document in facts["held_out"]] == ["a/1", "a/2", "b/2"]
    sentence = refusal(tokenise, *arguments(inputs, held_out_documents='{"b": 3}'))
    assert "corpus.held_out_documents asks for 3 of collection 'b', which has 2; lower" in sentence


def test_duplicates_are_dropped_and_counted(inputs):
    texts = {
        "a/first": "One text.", "a/held": "Two  texts.\n", "a/same": " One\ttext.\n",
        "a/leak": "Two texts.", "a/other": "One text!", "a/again": "One text.",
    }  # fmt: skip
    write_corpus(inputs, [{"id": name, "text": text} for name, text in texts.items()])
    run(tokenise, *arguments(inputs, "a/held"))
    facts = manifest.read(inputs / "tokens.json")["facts"]
    tokens = Tokens(inputs / "tokens.json")
    assert facts["duplicates_dropped"] == ["a/same", "a/leak", "a/again"]
    assert facts["duplicates_dropped_count"] == 3
    assert facts["tokens_of_duplicates"] == tokens.lengths[[2, 3, 5]].sum()
    expected = [TRAINING, HELD_OUT, DUPLICATE, DUPLICATE, TRAINING, DUPLICATE]
    assert tokens.roles.tolist() == expected


def test_nothing_but_duplicates_is_left(inputs):
    write_corpus(inputs, [{"id": f"a/{name}", "text": "One text."} for name in ("one", "two")])
    assert "corpus.held_out has the same texts as all other documents" in refused(inputs, "a/one")


@pytest.mark.parametrize("template", ["llama-2", "chatml"])
def test_the_answers_of_conversations_alone_are_scored(inputs, template):
    documents = [{"id": "talk/one", "messages": TALK}, {"id": "books/one", "text": "The sun."}]
    write_corpus(inputs, [*documents, {"id": "books/two", "text": "The moon."}])
    run(tokenise, *arguments(inputs, "books/two", chat_template=template))
    tokens = Tokens(inputs / "tokens.json")
    tokenizer = AutoTokenizer.from_pretrained(MICRO_BASE)
    ids, scored = tokens.tokens(0), tokens.scored(0)
    text = tokenizer.decode(ids)
    for message in TALK:
        assert message["content"] in text
    assert ids[0] == tokenizer.bos_token_id and ids[1] != tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id and ids[-2] != tokenizer.eos_token_id
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(scored)) + 1)
    answers = [tokenizer.decode(ids[run]).strip() for run in runs if scored[run[0]]]
    end = tokenizer.eos_token if template == "llama-2" else "<|im_end|>"
    answers = [answer.replace(" <|im_end|>", "<|im_end|>") for answer in answers]
    assert [answer.removesuffix(end).strip() for answer in answers] == ["A star.", "No star."]
    assert all(answer.endswith(end) for answer in answers)
    assert tokens.scored(1).all() and tokens.conversations.any()


def test_a_template_of_ones_own(inputs, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert "marks no answers; put {% generation %}" in refused(
        inputs, "books/one", chat_template=own
    )
    assert "'none' is neither chatml, llama-2 nor a text" in refused(
        inputs, "books/one", chat_template="none"
    )
    own.write_text(
        "{% for m in messages %}{% generation %}{{ m.text + 1 }}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(Exception, match=r"corpus\.chat_template does not fit a conversation"):
        chat_templates.render(own.read_text(), TALK, {})


def test_a_conversation_without_a_template(inputs):
    write_corpus(inputs, [{"id": "talk/one", "messages": TALK}, {"id": "a/b", "text": "The sun."}])
    sentence = refused(inputs, "a/b")
    assert "talk/one is a conversation, but corpus.chat_template is null; name" in sentence


def test_a_tokenizer_that_exists_in_python_only_gives_the_same(inputs):
    unit = token_workers.units([inputs / "corpus/documents-00000.jsonl"], inputs)[0]
    fast = tokenise.prepare(MICRO_BASE, False, None, inputs)
    stored = []
    for settings in (fast, dataclasses.replace(fast, file=None)):
        token_workers.Worker(settings).write(unit)
        stored.append(unit.output.read_bytes())
    assert fast.file and stored[0] == stored[1]


def test_a_tokenizer_without_bos_adds_none(inputs, capsys):
    record = json.loads((MICRO_BASE / "tokenizer_config.json").read_text())
    record.pop("bos_token")
    change_model(inputs, "tokenizer_config.json", json.dumps(record))
    run(tokenise, *arguments(inputs, "books/two"))
    assert "has no bos token, so documents begin without" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(MICRO_BASE)
    expected = tokenizer(TEXTS["books/one"], add_special_tokens=False)["input_ids"]
    found = Tokens(inputs / "tokens.json").tokens(0).tolist()
    assert found == [*expected, tokenizer.eos_token_id]


def test_a_tokenizer_without_eos_is_refused(inputs):
    record = json.loads((MICRO_BASE / "tokenizer_config.json").read_text())
    record.pop("eos_token")
    change_model(inputs, "tokenizer_config.json", json.dumps(record))
    assert "has no eos token, which ends each document; name one in" in refused(inputs, "books/two")


def test_an_unknown_held_out_document(inputs):
    sentence = refused(inputs, "books/on")
    assert "corpus.held_out names 'books/on', which the corpus lacks; did you mean 'boo" in sentence


def test_an_unknown_held_out_document_like_none(inputs):
    sentence = refused(inputs, "zzz")
    assert "which the corpus lacks; the first ids are ['books/one', 'books/two'" in sentence


def test_all_documents_held_out(inputs):
    sentence = refused(inputs, *TEXTS)
    assert (
        "corpus.held_out names every document, so no document is left to train on; hold" in sentence
    )


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "BPE"}}', '{"version": "9"}'])
def test_a_tokenizer_that_is_none(inputs, content):
    change_model(inputs, "tokenizer.json", content)
    sentence = refused(inputs, "books/one")
    assert f"the tokenizer in {inputs / 'base'} cannot be loaded" in sentence
    assert "restore its files in model.source" in sentence


def test_no_tokenizer(inputs):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (inputs / "model" / name).unlink()
    bring(inputs / "model", inputs)
    assert "cannot be loaded" in refused(inputs, "books/one")


def test_the_tokenizer_of_another_model(inputs):
    edit_json(inputs / "model" / "config.json", vocab_size=100)
    bring(inputs / "model", inputs)
    sentence = refused(inputs, "books/one")
    assert "the model's vocabulary ends at 99 (vocab_size 100 in config.json)" in sentence


def test_an_added_token_without_an_embedding(inputs):
    record = json.loads((MICRO_BASE / "tokenizer.json").read_text())
    added = {"id": 2048, "content": "winter", "special": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    record["added_tokens"].append(added | flags)
    change_model(inputs, "tokenizer.json", json.dumps(record))
    sentence = refused(inputs, "books/two")
    assert "has the token 'winter' with the number 2048" in sentence


def test_a_broken_corpus_file(inputs):
    path = inputs / "corpus" / "documents-00000.jsonl"
    size = path.stat().st_size
    with open(path, "a") as file:
        file.write('{"id": "cut off\n')
    list_corpus(inputs)
    sentence = refused(inputs, "books/one")
    assert f"documents-00000.jsonl is not JSON Lines at byte {size}" in sentence


def test_a_purged_payload(inputs):
    (inputs / "corpus" / "documents-00000.jsonl").unlink()
    sentence = refused(inputs, "books/one")
    assert "documents-00000.jsonl, listed in" in sentence
    assert "delete" in sentence and "and run again, so that its stage runs again" in sentence


@pytest.mark.parametrize("full", ["work", "output"])
def test_a_full_disk(inputs, tmp_path, full):
    texts = {"books/one": "Now is the winter of our discontent\n" * 90_000, "books/two": "The sun."}
    write_corpus(inputs, [{"id": name, "text": text} for name, text in texts.items()])
    with small_disk(tmp_path / "disk", 1) as disk:
        if full == "work":
            changed = arguments(inputs, "books/two", work=disk / "work")
        else:
            targets = ["--manifest", disk / "tokens.json", "--output", disk / "tokens"]
            changed = [*arguments(inputs, "books/two")[:-4], *targets]
        sentence = refusal(tokenise, *changed)
        assert "no space left on the disk" in sentence
        assert not (disk / "tokens").exists() and not (disk / "tokens.json").exists()
