"""The stage tokenise: every document between bos and eos, held-out ones apart, mistakes named."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from stages import MICRO_BASE, bring, edit_json, refusal, run, small_disk
from transformers import AutoTokenizer

import tokenise
from longyarn import manifest

TEXTS = {
    "books/one": "Now is the winter of our discontent\n",
    "books/two": "Made glorious summer by this sun of York;\n" * 3,
    "books/three": "And all the clouds that lour'd upon our house\n" * 2,
}


@pytest.fixture
def inputs(tmp_path):
    """A brought base model and a corpus of three documents."""
    shutil.copytree(MICRO_BASE, tmp_path / "model")
    bring(tmp_path / "model", tmp_path)
    lines = [json.dumps({"id": name, "text": text}) for name, text in TEXTS.items()]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "documents.jsonl").write_text("\n".join(lines) + "\n")
    list_corpus(tmp_path)
    return tmp_path


def list_corpus(directory) -> None:
    manifest.write(
        directory / "corpus.json",
        script=tokenise.__file__,
        settings={},
        inputs={},
        files=[directory / "corpus" / "documents.jsonl"],
        facts={"documents": len(TEXTS)},
    )


def arguments(directory, *held_out) -> list:
    return [
        "--base", directory / "base.json", "--corpus", directory / "corpus.json",
        "--held-out", *held_out, "--manifest", directory / "tokens.json",
        "--output", directory / "tokens",
    ]  # fmt: skip


def refused(directory, *held_out) -> str:
    """Return the sentence of a stage that stops; no output may be left."""
    sentence = refusal(tokenise, *arguments(directory, *held_out))
    assert not (directory / "tokens").exists()
    assert not (directory / "tokens.json").exists()
    return sentence


def change_model(directory, name: str, content: str) -> None:
    """Change a file of the model and bring the model again."""
    (directory / "model" / name).unlink()
    (directory / "model" / name).write_text(content)
    bring(directory / "model", directory)


def test_documents_lie_end_to_end_between_bos_and_eos(inputs):
    run(tokenise, *arguments(inputs, "books/two"))
    record = manifest.read(inputs / "tokens.json")
    stored = load_file(inputs / "tokens" / "tokens.safetensors")
    tokens, offsets = stored["tokens"], stored["offsets"]
    assert (tokens.dtype, offsets.dtype) == (np.int32, np.int64)
    assert (offsets[0], offsets[-1]) == (0, len(tokens))
    tokenizer = AutoTokenizer.from_pretrained(MICRO_BASE)
    for number, (name, text) in enumerate(TEXTS.items()):
        piece = tokens[offsets[number] : offsets[number + 1]]
        assert piece[0] == tokenizer.bos_token_id
        assert piece[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(piece[1:-1]) == text
        listed = record["facts"]["documents"][number]
        assert listed == {"id": name, "tokens": len(piece), "held_out": name == "books/two"}
    assert record["facts"]["tokens"] == len(tokens)
    assert record["facts"]["tokens_held_out"] == offsets[2] - offsets[1]


def test_a_tokenizer_without_bos_adds_none(inputs):
    record = json.loads((MICRO_BASE / "tokenizer_config.json").read_text())
    record.pop("bos_token")
    change_model(inputs, "tokenizer_config.json", json.dumps(record))
    run(tokenise, *arguments(inputs, "books/two"))
    stored = load_file(inputs / "tokens" / "tokens.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(MICRO_BASE)
    expected = tokenizer(TEXTS["books/one"], add_special_tokens=False)["input_ids"]
    assert stored["tokens"][: stored["offsets"][1]].tolist() == [*expected, tokenizer.eos_token_id]


def test_an_unknown_held_out_document(inputs):
    sentence = refused(inputs, "books/on")
    assert "corpus.held_out names 'books/on', which the corpus lacks; did you mean 'boo" in sentence


def test_an_unknown_held_out_document_like_none(inputs):
    sentence = refused(inputs, "zzz")
    assert "which the corpus lacks; the first ids are ['books/one', 'books/two'" in sentence


def test_all_documents_held_out(inputs):
    sentence = refused(inputs, *TEXTS)
    assert "corpus.held_out names every document, so none is left to train on; hold" in sentence


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
    assert "but the model's vocab_size is 100; model.source mixes files of two models" in sentence


def test_a_broken_corpus_file(inputs):
    with open(inputs / "corpus" / "documents.jsonl", "a") as file:
        file.write('{"id": "cut off\n')
    list_corpus(inputs)
    assert "documents.jsonl line 4 is not JSON" in refused(inputs, "books/one")


def test_a_purged_payload(inputs):
    (inputs / "corpus" / "documents.jsonl").unlink()
    sentence = refused(inputs, "books/one")
    assert "documents.jsonl, listed in" in sentence
    assert "delete" in sentence and "and run again, so that it is made anew" in sentence


def test_a_full_disk(inputs, tmp_path):
    texts = {"books/one": TEXTS["books/one"] * 40_000, "books/two": TEXTS["books/two"]}
    lines = [json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()]
    (inputs / "corpus" / "documents.jsonl").write_text("".join(lines))
    list_corpus(inputs)
    with small_disk(tmp_path / "disk", 1) as disk:
        targets = ["--manifest", disk / "tokens.json", "--output", disk / "tokens"]
        sentence = refusal(tokenise, *arguments(inputs, "books/two")[:-4], *targets)
        assert "no space left on the disk" in sentence
        assert list(disk.iterdir()) == []
