"""Which rules run after which change, over the real DAG of a finished run.

The table is the promise: when you change the evaluation, only the evaluation reruns.
"""

import re
import shutil

import pytest
from conftest import ROOT

from longyarn.core import manifest
from longyarn.core.code_hash import NOT_HASHED, sources
from longyarn.core.files import sha256

EVALUATIONS = {"perplexity": 3, "passkey": 3}
SEAL = {"provenance": 1}
REPORT = {"report": 1, "gate": 1, "export": 1} | SEAL
# What depends on the training sequences. Untrained variants do not.
FROM_PACK = {"pack": 1, "train": 1, "merge": 1, "perplexity": 1, "passkey": 1} | REPORT
FROM_TRAIN = {"train": 1, "merge": 1, "perplexity": 1, "passkey": 1} | REPORT
FROM_TOKENS = {"tokenise": 1} | FROM_PACK | {"perplexity": 3}
ALL = {"download_model": 1, "patch_rope": 2} | FROM_TOKENS | EVALUATIONS

CHANGES = {
    "nothing": ({}, {}),
    "evaluation length": (
        {"evaluation": {"perplexity": {"lengths": [256, 512, 1024]}}},
        {"perplexity": 3} | REPORT,
    ),
    "a protocol of perplexity": (
        {"evaluation": {"perplexity": {"sliding": None}}},
        {"perplexity": 3} | REPORT,
    ),
    "passkey trials": ({"evaluation": {"passkey": {"trials": 3}}}, {"passkey": 3} | REPORT),
    "tasks of lm_eval": (
        {"evaluation": {"harness": {"tasks": ["ruler_vt"], "lengths": [1024]}}},
        {"harness": 3} | REPORT,
    ),
    "learning rate": ({"training": {"learning_rate": 2.0e-3}}, FROM_TRAIN),
    "a threshold": ({"gate": {"merge_error": 0.9}}, REPORT),
    "the licence on the card": ({"export": {"license": "mit"}}, {"export": 1} | SEAL),
    "where to push": ({"export": {"repository": "an/owl", "private": False}}, SEAL),
    "long share": ({"mix": {"long_share": 0.5}}, FROM_PACK),
    "corpus seed": ({"mix": {"seed": 1}}, FROM_PACK),
    # The untouched base, the tokens and the downloads do not depend on the target.
    "target length": (
        {"rope": {"target_length": 2048}},
        {"patch_rope": 1} | FROM_PACK | {"perplexity": 2, "passkey": 2},
    ),
    "YaRN's ramp": (
        {"rope": {"beta_fast": 16}},
        {"patch_rope": 1} | FROM_PACK | {"perplexity": 2, "passkey": 2},
    ),
    "an extra variant": (
        {"evaluation": {"variants": ["base", "yarn", "trained", "ntk"]}},
        {"patch_rope": 1, "perplexity": 1, "passkey": 1} | REPORT,
    ),
    # The test configuration defines it, and does not list it.
    "an extra variant of one's own": (
        {"evaluation": {"variants": ["base", "yarn", "trained", "yarn-4"]}},
        {"patch_rope": 1, "perplexity": 1, "passkey": 1} | REPORT,
    ),
    "a variant of one's own defined": (
        {"evaluation": {"more_variants": {"linear-4": {"method": "linear", "factor": 4}}}},
        SEAL,
    ),
    "held-out documents": (
        {"corpus": {"held_out": ["shakespeare/hamlet"]}},
        FROM_TOKENS,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_reruns_exactly_what_depends_on_it(finished, change):
    overrides, expected = CHANGES[change]
    assert finished.planned(overrides) == expected


# A change of code that does something, at the end of a file.
EDIT = "\n\nADDED = 1\n"
# What an edit of each stage's code runs again. Stages that a run does not ask for are not here.
OF_STAGE = {
    "download_model": ALL,
    "download_corpus": {"download_corpus": 1} | FROM_TOKENS,
    "patch_rope": {"patch_rope": 2} | FROM_PACK | EVALUATIONS,
    "tokenise": FROM_TOKENS,
    "pack": FROM_PACK,
    "train": FROM_TRAIN,
    "merge": {"merge": 1, "perplexity": 1, "passkey": 1} | REPORT,
    "perplexity": {"perplexity": 3} | REPORT,
    "passkey": {"passkey": 3} | REPORT,
    "report": REPORT,
    "gate": {"gate": 1} | SEAL,
    "export": {"export": 1} | SEAL,
    "provenance": SEAL,
}


def closures() -> dict[str, frozenset[str]]:
    """Return the stages whose code each module of the library is part of, by the module's name."""
    found: dict[str, set[str]] = {}
    for stage in OF_STAGE:
        for path in sources(ROOT / f"scripts/{stage}.py", ROOT / "scripts"):
            found.setdefault(path.relative_to(ROOT / "scripts").as_posix(), set()).add(stage)
    return {name: frozenset(stages) for name, stages in found.items()}


def together(stages: frozenset[str]) -> dict[str, int]:
    """Return what runs again when the code of all these stages changes."""
    jobs: dict[str, int] = {}
    for stage in stages:
        for rule, count in OF_STAGE[stage].items():
            jobs[rule] = max(count, jobs.get(rule, 0))
    return jobs


# One module for each set of stages, scripts first: an edit of another module of the set does the same.
EDITED: dict[frozenset[str], str] = {}
for name, stages in sorted(closures().items(), key=lambda item: ("/" in item[0], item[0])):
    EDITED.setdefault(stages, name)


@pytest.mark.parametrize("edited", EDITED.values())
def test_an_edited_module_reruns_exactly_its_stages_and_what_follows(finished_copy, edited):
    path = finished_copy.directory / "scripts" / edited
    path.write_text(path.read_text() + EDIT)
    assert finished_copy.planned() == together(closures()[edited])


def test_the_modules_of_the_stages_that_matter_most():
    """What the test above takes from the imports, said by hand for a few modules."""
    found = closures()
    assert found["longyarn/training/guards.py"] == {"train"}
    assert found["longyarn/reporting/gate_outcome.py"] == {"gate", "export"}
    assert found["longyarn/evaluation/intervals.py"] == {"perplexity", "passkey", "report"}
    assert found["longyarn/provenance/ro_crate.py"] == {"provenance"}
    assert found["longyarn/core/manifest.py"] == {*OF_STAGE}


@pytest.mark.parametrize("module", ["bundle.py", *NOT_HASHED])
def test_rewording_progress_and_records_reruns_nothing(finished_copy, module):
    path = finished_copy.directory / "scripts" / module
    path.write_text(path.read_text() + EDIT)
    assert finished_copy.planned() == {}


def test_comments_docstrings_and_touching_change_nothing(finished_copy):
    for path in (finished_copy.directory / "scripts").rglob("*.py"):
        text = path.read_text()
        assert text.startswith('"""'), path
        path.write_text("# A comment.\n" + text.replace('"""', '"""Changed. ', 1))
    config = finished_copy.directory / "config.yaml"
    config.write_text("# A comment.\n" + config.read_text())
    assert finished_copy.planned() == {}


def test_a_changed_base_model_reruns_what_is_made_from_it(finished_copy):
    card = finished_copy.directory / "resources/micro-base/config.json"
    card.write_text(card.read_text().replace("512", " 512"))
    assert finished_copy.planned() == ALL


def test_accepting_a_change_of_code(finished_copy):
    """docs/reruns.md: `make accept`, which is this command."""
    path = finished_copy.directory / "scripts/longyarn/core/manifest.py"
    path.write_text(path.read_text() + EDIT)
    assert "train" in finished_copy.planned()
    finished_copy.snakemake("--touch")
    assert finished_copy.planned() == {}
    # It accepts that change, not the next one.
    path.write_text(path.read_text() + EDIT.replace("ADDED", "MORE"))
    assert "train" in finished_copy.planned()


def purge(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.parametrize("purged", ["base", "base/model.safetensors", "tokens/index.safetensors"])
def test_a_purged_payload_is_rebuilt_when_it_is_needed(finished_copy, purged):
    run = finished_copy.directory / "results" / "tests"
    purge(run / purged)
    overrides = {"evaluation": {"variants": ["base"], "passkey": {"trials": 1}}}
    target = "results/tests/passkey/base.json"
    if purged.startswith("tokens"):
        overrides = {"evaluation": {"perplexity": {"lengths": [256, 512]}}}
        target = "results/tests/perplexity/base.json"
    done = finished_copy.snakemake(target, overrides=overrides)
    assert (run / purged).exists()
    rebuilt = "tokenise" if purged.startswith("tokens") else "download_model"
    assert re.search(rf"rule {rebuilt}:", done.stdout)
    assert manifest.read(finished_copy.directory / target)["facts"]


@pytest.mark.parametrize("purged", ["merged", "merged/model.safetensors"])
def test_the_merged_model_is_a_product_and_is_rebuilt_at_once(finished_copy, purged):
    purge(finished_copy.directory / "results/tests" / purged)
    assert finished_copy.planned() == {"merge": 1, "perplexity": 1, "passkey": 1} | REPORT


@pytest.mark.parametrize("purged", ["export", "export/README.md"])
def test_the_exported_model_is_a_product_too(finished_copy, purged):
    purge(finished_copy.directory / "results/tests" / purged)
    assert finished_copy.planned() == {"export": 1} | SEAL


def test_purged_scratch_alone_schedules_nothing(finished_copy):
    for name in ("base", "corpus", "tokens", "pack"):
        purge(finished_copy.directory / "results/tests" / name)
    shutil.rmtree(finished_copy.directory / "work")
    assert finished_copy.planned() == {}


def test_manifests_chain_and_hold_no_time_host_or_path(finished):
    run = finished.directory / "results" / "tests"
    record = manifest.read(run / "merged.json")
    for name, source in (("base", "base"), ("rope", "rope/yarn"), ("train", "trained")):
        assert record["inputs"][name] == sha256(run / f"{source}.json")
    for path in [*run.glob("*.json"), *run.glob("*/*.json")]:
        text = path.read_text()
        assert str(finished.directory) not in text, path
        assert str(ROOT) not in text, path
    for name, entry in record["files"].items():
        assert sha256(run / name) == entry["sha256"]
