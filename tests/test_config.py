"""The configuration: defaults, descriptions, and one sentence for each kind of mistake."""

import copy

import pytest
import yaml
from conftest import ROOT

from longyarn.config import derived, reference
from longyarn.config.load import complete
from longyarn.core.errors import UserError

SCHEMA_PATH = ROOT / "schemas" / "config.schema.yaml"
SCHEMA = yaml.safe_load(SCHEMA_PATH.read_text(encoding="utf-8"))
DEFAULT = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))

MINIMAL = {
    "run": "minimal",
    "model": {"source": "model"},
    "rope": {"target_length": 1024},
    "corpus": {
        "packages": [
            {
                "name": "books",
                "version": "1",
                "sha256": "0" * 64,
                "documents": [{"collection": "books", "files": "*"}],
            }
        ],
        "held_out": ["books/one"],
    },
}


def changed(base: dict, path: str, value) -> dict:
    """Return a copy of a config with the key at a dotted path set; numbers index lists."""
    result = copy.deepcopy(base)
    at = result
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        at = at[part]
    at[last] = value
    return result


def refusal(base: dict, changes: dict) -> str:
    """Return the sentence with which a config is refused after some changes."""
    for path, value in changes.items():
        base = changed(base, path, value)
    with pytest.raises(UserError) as caught:
        complete(base, SCHEMA_PATH)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def keys(schema: dict, value: dict, path: str = ""):
    """Yield ``(path, schema, value)`` of each key of a schema, with what a config has there."""
    for key, sub in schema.get("properties", {}).items():
        found = value.get(key, "absent")
        yield f"{path}{key}", sub, found
        if isinstance(found, dict):
            yield from keys(sub, found, f"{path}{key}.")
        if isinstance(found, list):
            for item in found:
                if isinstance(item, dict):
                    yield from keys(sub["items"], item, f"{path}{key}.")


def test_the_embedded_default_is_accepted_and_states_every_key():
    complete(DEFAULT, SCHEMA_PATH)
    for path, sub, value in keys(SCHEMA, DEFAULT):
        in_documents = path.startswith("corpus.packages.documents.")
        assert value != "absent" or (in_documents and "default" in sub), path


def test_every_key_has_a_type_and_a_description():
    described = {path: sub["description"] for path, sub, _ in keys(SCHEMA, DEFAULT)}
    assert len(described) > 60
    for path, sub, _ in keys(SCHEMA, DEFAULT):
        assert {"type", "enum"} & set(sub), path
        assert sub["description"].endswith("."), path


def test_the_reference_has_every_key_as_the_schema_describes_it():
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run `make reference`"
    for path, sub, _ in keys(SCHEMA, DEFAULT):
        if "properties" not in sub and "." in path:
            assert any(
                line.replace("[]", "").startswith(f"| `{path}` |") and sub["description"] in line
                for line in reference.page().splitlines()
            ), path


def test_a_minimal_config_gets_every_default_of_the_schema():
    filled = complete(MINIMAL, SCHEMA_PATH)
    stated = {"corpus.packages", "corpus.held_out"}
    derived_values = {
        "corpus.held_out_documents": {}, "evaluation.perplexity.tokens_per_document": 2048,
    }  # fmt: skip
    compared = 0
    for path, sub, value in keys(SCHEMA, filled):
        if "default" in sub and "properties" not in sub and path not in stated:
            assert value == derived_values.get(path, sub["default"]), path
            compared += 1
        assert value != "absent", path
    assert compared > 40
    assert "mix" not in MINIMAL, "the caller's config stays as it was"
    assert filled["training"]["lora"]["alpha"] == 128
    assert (filled["training"]["learning_rate"], filled["training"]["steps"]) == (2.0e-5, 400)
    assert filled["corpus"]["packages"][0]["documents"][0]["encoding"] == "utf-8"


def test_defaults_in_config_yaml_win_over_those_of_the_schema():
    filled = complete(DEFAULT, SCHEMA_PATH)
    assert filled["training"]["lora"]["rank"] == 32
    assert filled["corpus"]["packages"][0]["documents"][0]["encoding"] == "latin-1"


MISTAKES = [
    # unknown keys
    ({"colour": 1}, "config key 'colour' is unknown; known are run, paths,"),
    ({"rope.beta_fst": 32}, "config key 'rope.beta_fst' is unknown; did you mean 'beta_fast'?"),
    ({"rope.attn_factor": 1.2}, "rope.attn_factor' is unknown; did you mean 'attention_factor'"),
    ({"training.lora.rnk": 4}, "config key 'training.lora.rnk' is unknown; did you mean 'rank'?"),
    (
        {"corpus.packages.0.documents.0.file": "*"},
        "config key 'corpus.packages[0].documents[0].file' is unknown; did you mean 'files'?",
    ),
    ({"rope": {"target_lenght": 4096}}, "'rope.target_lenght' is unknown; did you mean 'target_l"),
    ({"rope": {}}, "config key 'rope.target_length' is missing; The new max_position_embeddings"),
    # wrong types and ranges
    ({"training.learning_rate": "1e-4"}, "YAML reads 1e-4 as text, so write 1.0e-4"),
    ({"training.learning_rate": -1}, "'training.learning_rate' is -1, but must be more than 0"),
    ({"training.learning_rate": "many"}, 'is "many", but must be a number (Peak learning rate)'),
    ({"training.learning_rate": float("nan")}, "is NaN, but must be a number"),
    ({"training.learning_rate": float("inf")}, "is Infinity, but must be a number"),
    ({"training.learning_rate": [1, 2]}, "'training.learning_rate' is [1, 2], but must be a numb"),
    ({"training.learning_rate": None}, "'training.learning_rate' is null, but must be a number"),
    ({"training.steps": 2.5}, "is 2.5, but must be a whole number or null"),
    ({"training.steps": True}, "is true, but must be a whole number or null"),
    ({"training.batch_size": 0}, "'training.batch_size' is 0, but must be at least 1"),
    ({"training.lora.dropout": 1}, "'training.lora.dropout' is 1, but must be less than 1"),
    ({"training.precision": "fp8"}, "must be one of bf16, fp16, fp32"),
    ({"training": None}, "config key 'training' is null, but must be a mapping"),
    ({"rope.target_length": 4096.0}, "'rope.target_length' is 4096.0, but must be a whole number"),
    (
        {"rope.target_length": "long"},
        "'rope.target_length' is \"long\", but must be a whole number",
    ),
    ({"rope.write_config": "yes"}, 'is "yes", but must be true or false'),
    ({"rope.factor": 1}, "'rope.factor' is 1, but must be more than 1"),
    ({"mix.long_share": 1.5}, "'mix.long_share' is 1.5, but must be at most 1"),
    (
        {"model.revision": "main", "model.locked": True},
        "model.revision main is a branch or a tag, which can move, and model.locked is true; write",
    ),
    ({"model.revision": "main; ls"}, "'model.revision' is \"main; ls\", but is not of the form"),
    ({"corpus.packages.0.version": 0.6}, "[0].version' is 0.6, but must be text; put it in quotes"),
    (
        {"corpus.packages.0.sha256": "abc"},
        "'corpus.packages[0].sha256' is \"abc\", but is not of the form asked for (SHA-256",
    ),
    ({"corpus.packages": []}, "corpus is empty; state corpus.packages, corpus.files or corpus.dat"),
    ({"corpus.held_out": ["a", "a"]}, "must not repeat an entry"),
    ({"corpus.held_out": []}, "nothing is held out for evaluation; name documents in corpus.held_"),
    ({"corpus.held_out_documents": {"kjv": 0}}, "is 0, but must be at least 1"),
    (
        {"mix.shares": {"kjv": 0.5, "milton": 0.4}},
        "mix.shares sum to 0.9; fix them so that they sum",
    ),
    ({"mix.shares": {"kjv": 1.5}}, "is 1.5, but must be at most 1"),
    (
        {"mix.shares": {"kjv": 1}, "mix.short_from": ["milton"]},
        "mix.short_from names the collection 'milton', to which mix.shares gives nothing",
    ),
    (
        {"mix.shares": {"bible": 1}},
        "mix.shares names the collection 'bible', which no source has; the corpus has kjv, milton, shak",
    ),
    ({"mix.short_from": ["Milton"]}, "'Milton', which no source has; the corpus has milton"),
    (
        {"rope.method": "none"},
        "rope.method none keeps the model's own length, so sequences have none",
    ),
    ({"mix.packing": "first_fit"}, "must be one of concat, best_fit"),
    (
        {"training.steps": 100},
        "reads 819200 tokens, but the pack holds 614400: 204800 tokens are m",
    ),
    ({"model.source": ""}, "'model.source' is \"\", but must not be empty"),
    ({"evaluation.passkey.lengths": 512}, "is 512, but must be a list"),
    ({"evaluation.passkey.lengths": [512, "x"]}, "'evaluation.passkey.lengths[1]' is \"x\""),
    ({"evaluation.passkey.depths": [1.5]}, "'evaluation.passkey.depths[0]' is 1.5, but must be at"),
    # contradictions
    (
        {"evaluation.passkey.lengths": [8192]},
        "evaluation.passkey.lengths has 8192, beyond rope.tar",
    ),
    (
        {"evaluation.harness.tasks": ["ruler_vt"], "evaluation.harness.lengths": [8192]},
        "evaluation.harness.lengths has 8192, beyond rope.target_length 4096",
    ),
    ({"evaluation.passkey.haystack": "no/such.txt"}, "haystack no/such.txt is not a file; correct"),
    ({"evaluation.perplexity.lengths": [8192]}, "evaluation.perplexity.lengths has 8192, beyond"),
    (
        {"evaluation.perplexity.sliding": {"lengths": [4096, 256]}},
        "sliding.stride 256 is not below the shortest length 256, so windows would not overlap",
    ),
    (
        {"evaluation.perplexity.sliding": {"stride": 8}},
        "perplexity.sliding.lengths' is missing; Win",
    ),
    (
        {"evaluation.perplexity.lengths": [512], "evaluation.perplexity.truncate.lengths": [1024]},
        "truncate.lengths has 1024, beyond the longest of evaluation.perplexity.lengths 512, by which",
    ),
    (
        {"evaluation.perplexity.by_position.buckets": 1024, "evaluation.perplexity.lengths": [512]},
        "by_position.buckets 1024 divides windows of 512 tokens into parts of less than 2; lower it",
    ),
    (
        {"evaluation.perplexity.stride": 256},
        "config key 'evaluation.perplexity.stride' is unknown",
    ),
    ({"evaluation.perplexity.tokens_per_document": 99}, "tokens_per_document 99 is less than"),
    (
        {"rope.factor": 4, "rope.original_max_position_embeddings": 512},
        "rope.factor 4 contradicts rope.target_length 4096 / rope.original_max_position_embeddings",
    ),
    ({"rope.beta_fast": 1, "rope.beta_slow": 32}, "rope.beta_fast 1 must be larger than"),
    ({"training.epochs": 1}, "state either training.steps or training.epochs, and leave the other"),
    ({"training.steps": None}, "state either training.steps or training.epochs"),
    (
        {"training.batch_size": 3, "training.micro_batch_size": 2},
        "training.batch_size 3 cannot be d",
    ),
    ({"training.gpus": 4}, "training.batch_size 2 cannot be divided by micro_batch_size 1 × 4"),
    ({"training.gradient_accumulation_steps": 8}, "training.gradient_accumulation_steps 8 contrad"),
    ({"training.precision": "fp16"}, "training.precision fp16 needs a GPU; on the CPU choose bf16"),
    (
        {"training.mode": "full", "training.lora.train_norms": True},
        "training.lora.train_norms belongs to training.mode lora",
    ),
    ({"export.repository": "owl"}, "'export.repository' is \"owl\", but is not of the form asked"),
    ({"export.repository": "datasets/me/owl"}, 'export.repository\' is "datasets/me/owl", but is'),
    (
        {"export.license": "Apache 2.0"},
        "'export.license' is \"Apache 2.0\", but is not of the form",
    ),
    ({"export.language": "en"}, "'export.language' is \"en\", but must be a list or null"),
]


@pytest.mark.parametrize(("changes", "expected"), MISTAKES, ids=[str(c)[:60] for c, _ in MISTAKES])
def test_a_mistake_gets_one_sentence_that_names_the_key(changes, expected):
    sentence = refusal(DEFAULT, changes)
    assert expected in sentence
    assert len(sentence) < 400


def test_a_gate_that_is_null_asks_nothing():
    assert set(complete(DEFAULT | {"gate": None}, SCHEMA_PATH)["gate"].values()) == {None}


@pytest.mark.parametrize(
    ("training", "key", "expected"),
    [
        ({"epochs": 1}, "steps", None),
        ({"epochs": None}, "steps", 400),
        ({"mode": "full"}, "lora.train_embeddings", False),
        ({"mode": "full", "lora": {"rank": 8}}, "lora.train_norms", False),
        ({"mode": "lora"}, "lora.train_norms", True),
    ],
)
def test_a_default_gives_way_to_what_contradicts_it(training, key, expected):
    found = complete(MINIMAL | {"training": training}, SCHEMA_PATH)
    for part in ["training", *key.split(".")]:
        found = found[part]
    assert found == expected


def test_without_held_out_documents_the_first_of_the_first_collection_are_held_out():
    files = [{"collection": name, "files": f"{name}/*"} for name in ("books", "code")]
    filled = complete(MINIMAL | {"corpus": {"files": files}}, SCHEMA_PATH)
    assert filled["corpus"]["held_out_documents"] == {"books": derived.HELD_OUT_DOCUMENTS}
    named = {"files": files, "held_out": ["code/1"]}
    filled = complete(MINIMAL | {"corpus": named}, SCHEMA_PATH)
    assert filled["corpus"]["held_out_documents"] == {}


def test_a_completed_configuration_is_complete():
    """The one that a run is sealed with must be read again as it is."""
    for training in ({}, {"mode": "full"}, {"epochs": 2}):
        filled = complete(MINIMAL | {"training": training}, SCHEMA_PATH)
        assert complete(filled, SCHEMA_PATH) == filled


@pytest.mark.parametrize(
    ("stated", "original", "target", "least", "expected"),
    [
        (None, 4096, 32768, 1, [4096, 8192, 16384, 32768]),
        (None, 4096, 10000, 1, [4096, 8192, 10000]),
        (None, 8192, 4096, 1, [4096]),
        (None, 512, 4096, 1024, [1024, 2048, 4096]),
        (None, None, 4096, 1, [4096]),
        ([600], 512, 4096, 1024, [600]),
    ],
)
def test_lengths_of_the_evaluation(stated, original, target, least, expected):
    assert derived.evaluation_lengths(stated, original, target, least) == expected


def test_the_original_length_that_the_configuration_states_is_the_one_to_evaluate_at():
    rope = {"target_length": 4096, "original_max_position_embeddings": 1024}
    rope |= {"original_reason": "a test"}
    filled = complete(MINIMAL | {"rope": rope}, SCHEMA_PATH)
    assert derived.evaluation(filled, 2048)["passkey"]["lengths"] == [1024, 2048, 4096]


def test_a_long_value_is_cut():
    sentence = refusal(DEFAULT, {"run": ["x" * 50] * 50})
    assert "…, but must be text" in sentence
    assert len(sentence) < 300


def test_every_keyword_of_the_schema_has_its_words():
    """A keyword without words would be a KeyError in front of the user."""
    spoken = {
        "type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern",
        "minItems", "minLength", "uniqueItems", "additionalProperties", "required",
    }  # fmt: skip
    silent = {"description", "default", "properties", "items"}
    for path, sub, _ in keys(SCHEMA, DEFAULT):
        assert set(sub) | set(sub.get("items", {})) <= spoken | silent, path


@pytest.mark.parametrize(
    ("batch", "micro", "nodes", "gpus", "steps"),
    [(8, 2, 1, 0, 4), (8, 2, 1, 1, 4), (8, 2, 1, 4, 1), (8, 1, 1, 4, 2), (8, 2, 2, 0, 2), (8, 1, 2, 4, 1)],
)  # fmt: skip
def test_accumulation_follows_from_batch_and_processes(batch, micro, nodes, gpus, steps):
    training = {
        "batch_size": batch,
        "micro_batch_size": micro,
        "nodes": nodes,
        "gpus": gpus,
        "sp_size": 1,
        "gradient_accumulation_steps": None,
    }
    assert derived.accumulation(training) == steps
    assert derived.accumulation(training | {"gradient_accumulation_steps": steps}) == steps
