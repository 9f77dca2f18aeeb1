"""The report: its verdict, the structure of report.json, and a page that needs no other file."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from stages import rope_facts
from test_config import DEFAULT

from longyarn.core.code_hash import code_hash
from longyarn.core.errors import UserError
from longyarn.core.files import sha256, write_json
from longyarn.evaluation import intervals
from longyarn.reporting import evidence_warnings, verdict, wording
from longyarn.reporting.curves import spread
from longyarn.reporting.results import Results

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {f"books/{name}": 1000 for name in ("a", "b", "c", "d", "e", "f")}
DEPTHS = ("0.1", "0.5", "0.9")
GOOD = {"base": {512: 31.0, 4096: 900.0}, "trained": {512: 31.2, 4096: 28.0}}
FOUND = {"base": {512: 30, 4096: 0}, "trained": {512: 30, 4096: 30}}


def perplexity_facts(values: dict[int, float], documents=DOCUMENTS, too_short=()) -> dict:
    """Return facts as the perplexity stage writes them; documents differ in difficulty."""
    lengths = {}
    for length, value in values.items():
        losses = {
            name: tokens
            * (math.log(value) + 0.05 * (number % 3 - 1) + 1e-4 * (number * length % 7))
            for number, (name, tokens) in enumerate(documents.items())
        }
        value, low, high = intervals.bootstrap_perplexity(
            *(figures_of(losses), figures_of(documents))
        )
        lengths[str(length)] = {
            "value": value, "low": low, "high": high, "window_mean": value, "losses": losses,
        }  # fmt: skip
    return {
        "tokens_scored": sum(documents.values()),
        "lengths": lengths,
        "truncate": lengths,
        "by_position": lengths,
        "sliding": lengths,
        "documents": dict(documents),
        "too_short": list(too_short),
    }


def figures_of(values: dict):
    import numpy as np

    return np.asarray(list(values.values()), dtype=float)


TASKS = {
    "ruler_vt": {
        "version": 1.0,
        "num_fewshot": 0,
        "metrics": {"2048": {"value": 0.5, "stderr": 0.25, "examples": 8}},
    }
}


def grid(successes: dict[int, int], trials: int = 30) -> dict:
    """Return a passkey grid with the same successes of ``trials`` at every depth."""
    cells = {}
    for length, count in successes.items():
        low, high = intervals.wilson(count, trials)
        cell = {"successes": count, "trials": trials, "low": low, "high": high}
        cells[str(length)] = {depth: dict(cell) for depth in DEPTHS}
    return cells


def shown(perplexity=GOOD, passkey=FOUND, **lengths) -> Results:
    return Results(
        **({"original": 512, "target": 4096} | lengths),
        perplexity={variant: perplexity_facts(values) for variant, values in perplexity.items()},
        passkey={variant: grid(counts) for variant, counts in passkey.items()},
    )


def judge(results: Results, **changes) -> dict:
    return verdict.judge(results, DEFAULT["gate"] | {"passkey_rate": 0.95} | changes)


def checks(found: dict) -> dict[str, bool]:
    return {check["name"]: check["passed"] for check in found["checks"]}


def test_all_checks_pass_and_the_sentence_states_both_figures():
    found = judge(shown())
    assert checks(found) == dict.fromkeys(verdict.CHECKS, True)
    assert found["headline"] == "All 5 checks pass"
    assert " but " not in found["sentence"]
    for part in ("28.", "31.", "90 of 90 passkeys", "0 of 90 passkeys", "95 % interval"):
        assert part in found["sentence"]


@pytest.mark.parametrize(
    ("name", "perplexity", "passkey"),
    [
        ("trained_perplexity_holds", GOOD | {"trained": {512: 31.2, 4096: 31.9}}, FOUND),
        ("original_length_kept", GOOD | {"trained": {512: 32.2, 4096: 28.0}}, FOUND),
        ("base_perplexity_breaks", GOOD | {"base": {512: 31.0, 4096: 45.0}}, FOUND),
        ("trained_passkey_found", GOOD, FOUND | {"trained": {512: 30, 4096: 28}}),
        ("base_passkey_fails", GOOD, FOUND | {"base": {512: 30, 4096: 4}}),
    ],
)
def test_each_check_fails_alone_and_the_sentence_says_so(name, perplexity, passkey):
    found = judge(shown(perplexity, passkey))
    assert checks(found) == dict.fromkeys(verdict.CHECKS, True) | {name: False}
    assert found["headline"] == "1 of 5 checks fails"
    failed = next(check for check in found["checks"] if check["name"] == name)
    clause = failed["sentence"][0].lower() + failed["sentence"][1:]
    assert found["sentence"].endswith(f"; but {clause}")
    assert "pass." not in found["sentence"]


def test_a_threshold_inside_the_interval_is_said():
    few = {variant: grid(counts, trials=4) for variant, counts in {"trained": {4096: 4}}.items()}
    found = judge(Results(512, 4096, {}, few))
    (check,) = found["checks"]
    assert check["passed"] and not check["decided"]
    assert "includes the threshold of “trained passkey found”" in found["sentence"]


def test_one_document_gives_no_interval_and_decides_nothing():
    facts = perplexity_facts({512: 30.0, 4096: 29.0}, documents={"books/a": 1000})
    found = judge(Results(512, 4096, {"trained": facts}, {}))
    assert "one document, so no interval" in found["sentence"]
    assert not found["checks"][0]["decided"]


def test_ratios_are_paired_by_document():
    """Each document improves by the same factor, so the ratio is known although the documents differ."""
    found = shown().ratio("trained", 4096, "trained", 512)
    assert found == pytest.approx((28.0 / 31.2,) * 3, rel=2e-3)
    with pytest.raises(UserError, match="different tokens"):
        other = Results(
            512, 4096,
            {"base": perplexity_facts({512: 3.0}), "trained": perplexity_facts({512: 3.0}, {"x": 9})},
            {},
        )  # fmt: skip
        judge(other)


@pytest.mark.parametrize("absent", ["trained", "base"])
def test_a_missing_variant_leaves_its_checks_out(absent):
    kept = "base" if absent == "trained" else "trained"
    found = judge(shown({kept: GOOD[kept]}, {kept: FOUND[kept]}))
    assert len(found["checks"]) == 2 and len(found["not_checked"]) == 3
    assert found["headline"] == "2 of 5 checks made, all of them passed"
    assert f"{absent!r} was not evaluated" in found["sentence"]


def test_nothing_evaluated_claims_nothing():
    found = judge(shown({}, {}))
    assert found["checks"] == [] and found["headline"] == "Nothing could be checked"
    assert "pass" not in found["sentence"].replace("passkey", "")


def test_a_target_that_was_not_evaluated_is_named():
    found = judge(shown(target=8192))
    assert list(checks(found)) == ["original_length_kept"]
    assert all("at 8,192 tokens" in gap["reason"] for gap in found["not_checked"])


def test_a_threshold_that_is_null_is_not_compared():
    found = judge(shown(), passkey_rate=None)
    assert list(checks(found)) == [n for n in verdict.CHECKS if n != "trained_passkey_found"]
    assert found["not_checked"][0]["reason"] == "gate.passkey_rate is null"


def test_without_extension_only_two_checks_remain():
    found = judge(shown(target=512))
    assert checks(found) == {"original_length_kept": True, "trained_passkey_found": True}


def test_shares_are_never_rounded_to_nothing_or_all():
    assert wording.percent(0.0002) == "< 0.1 %" and wording.percent(0.9999) == "> 99.9 %"
    assert (wording.percent(0), wording.percent(1), wording.percent(0.125)) == (
        "0 %",
        "100 %",
        "12.5 %",
    )


MIX = {
    "tokens_in": 100_000, "tokens_packed": 81_920, "tails_dropped": 80, "unused_by_the_mix": 12_000,
    "held_out": 6_000, "duplicates": 0, "share_past_original": 0.7,
}  # fmt: skip
TRAINING = {"loss": [[1, 4.0], [5, 3.6], [10, 3.4], [15, 3.5]], "epochs": 1.0}


def test_a_sound_run_has_no_warnings():
    assert evidence_warnings.of_run(shown(), MIX, TRAINING) == []


@pytest.mark.parametrize(
    ("mix", "training", "words"),
    [
        ({"share_past_original": 0.004}, {}, "Only 0.4 % of the packed tokens"),
        ({"share_past_original": 0.0}, {}, "Only 0 % of the packed tokens"),
        ({"tails_dropped": 79}, {}, "99,999 are accounted for"),
        ({}, {"loss": [[1, 3.0], [5, 3.2]]}, "The training loss rose: its mean was 3.0000"),
        ({}, {"epochs": 2.5}, "2.50 times"),
        ({}, {"epochs": 0.5}, "read 50 % of the packed sequences"),
    ],
)
def test_warnings_about_mix_and_training(mix, training, words):
    (warning,) = evidence_warnings.of_run(shown(), MIX | mix, TRAINING | training)
    assert words in warning


def test_warnings_about_the_evaluation():
    facts = perplexity_facts({4096: 9.0}, {"books/a": 10, "books/b": 10}, too_short=["books/c"])
    passkey = {"base": grid({512: 30}), "trained": grid({512: 10})}
    found = evidence_warnings.of_evaluation(Results(512, 4096, {"trained": facts}, passkey))
    words = ("2 held-out documents", "books/c", "30 of 90")
    assert all(word in text for word, text in zip(words, found, strict=True))
    assert "fewer than 4,096 tokens was left out" in found[1]


def test_labels_are_spread_but_stay_in_order():
    places = spread([0.1, 0.11, 0.12, 0.9], 0.1)
    gaps = [after - before for before, after in pairwise(places)]
    assert min(gaps) >= 0.1 - 1e-9 and places[-1] == 0.9
    assert sum(places[:3]) / 3 == pytest.approx(0.11)


# The whole stage, on invented manifests.


class Run:
    """A directory of manifests like those of a run, each naming the inputs it was made from."""

    def __init__(self, root: Path, variants=("base", "yarn", "trained")) -> None:
        self.root, self.variants = root, variants
        self.write("base", "download_model", {
            "directory": "base", "source": "/models/tiny", "revision": None, "bytes": 10,
            "trust_remote_code": False, "model_type": "llama",
        }, {"source": "/models/tiny", "revision": None})  # fmt: skip
        self.write("corpus", "download_corpus", {"documents": 7, "characters": 70})
        plain = [1 / 10000 ** (i / 8) for i in range(8)]
        for name in ("base", "yarn"):
            factor = 1.0 if name == "base" else 8.0
            facts = rope_facts(
                method="none" if name == "base" else "yarn", factor=factor,
                max_position_embeddings=int(512 * factor),
                inverse_frequencies=[f / factor for f in plain], base_inverse_frequencies=plain,
                ramp_limits=None if name == "base" else [1, 4],
            )  # fmt: skip
            self.write(f"rope/{name}", "patch_rope", facts, inputs={"base": "base"})
        held = [{"id": name, "tokens": 1000} for name in DOCUMENTS]
        self.write("tokens", "tokenise", {
            "tokens": 100_000, "tokens_held_out": 6_000, "held_out": held,
            "duplicates_dropped": ["x/copy"], "duplicates_dropped_count": 1,
        }, inputs={"base": "base", "corpus": "corpus"})  # fmt: skip
        self.write("pack", "pack", MIX | {
            "document_masks": True, "sequence_length": 4096, "sequences": 20, "long_sequences": 16,
            "documents": 1, "documents_used": 1, "documents_cut": 1, "long_documents": 1,
            "tokens_scored": 80_000, "conversations_too_long": 2,
            "long_windows": 22, "packing": "best_fit", "padding": 10, "allow_repeats": False,
            "collections": {"x": {
                "documents": 1, "documents_used": 1, "tokens": 94_000, "tokens_packed": 81_920,
                "share": 1.0,
            }},
            "piece_lengths": [{"up_to": 4096, "pieces": 20, "tokens": 81_920}],
            "short_tokens": {"short documents and tails": 16_384, "cut from long documents": 0},
        }, {"long_share": 0.8}, {"rope": "rope/yarn", "tokens": "tokens"})  # fmt: skip
        self.write("train", "train", TRAINING | {
            "directory": "adapter", "mode": "lora", "steps": 15, "sequences_seen": 20,
            "tokens_seen": 81_920, "trainable_parameters": 5, "world_size": 1,
            "gradient_accumulation_steps": 2, "guards": {"document_mask_leak": 0.0},
        }, {
            "learning_rate": 1e-3, "batch_size": 2, "precision": "fp32",
            "lora": {"rank": 4, "targets": "all-linear"},
        }, {"base": "base", "pack": "pack", "rope": "rope/yarn"})  # fmt: skip
        self.write(
            "merge",
            "merge",
            {"mode": "lora", "bytes": 11, "merge_error": 0.0},
            {},
            {"train": "train"},
        )
        for variant in variants:
            inputs = {
                "model": "merge" if variant == "trained" else "base",
                "rope": "rope/base" if variant == "base" else "rope/yarn",
            }
            kind = "base" if variant == "base" else "trained"
            self.write(
                f"perplexity/{variant}", "perplexity", perplexity_facts(GOOD[kind]),
                {"variant": variant, "tokens_per_document": 1000, "sliding": {"stride": 256}},
                inputs | {"tokens": "tokens"},
            )  # fmt: skip
            self.write(
                f"passkey/{variant}", "passkey", {"grid": grid(FOUND[kind])},
                {"variant": variant, "digits": 5, "trials": 30}, inputs,
            )  # fmt: skip
            self.write(f"harness/{variant}", "harness", {"tasks": TASKS}, {"limit": 8}, inputs)
        (root / "benchmarks").mkdir()
        (root / "benchmarks" / "train.tsv").write_text("s\tmax_rss\n12.5\t300.25\n")
        (root / "benchmarks" / "merge.tsv").write_text("s\tmax_rss\n0.3\tNA\n")

    def write(self, name: str, stage: str, facts: dict, settings=None, inputs=None) -> None:
        write_json(self.root / f"{name}.json", {
            "stage": stage, "settings": settings or {}, "files": {}, "facts": facts,
            "inputs": {
                key: sha256(self.root / f"{path}.json")
                for key, path in (inputs or {}).items()
            },
            "code": "0123456789abcdef", "versions": {"python": "3.11.7", "torch": "2.13.0"},
        })  # fmt: skip

    def report(self, out: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "scripts" / "report.py"]
        for name in ("base", "corpus", "tokens", "pack", "train", "merge"):
            command += [f"--{name}", self.root / f"{name}.json"]
        command += ["--rope", *(f"{n}={self.root}/rope/{n}.json" for n in ("base", "yarn"))]
        for stage in ("perplexity", "passkey", "harness"):
            command += [f"--{stage}", *(f"{v}={self.root}/{stage}/{v}.json" for v in self.variants)]
        command += ["--trained-rope", "yarn", "--benchmarks", self.root / "benchmarks"]
        command += [
            "--disclosure",
            "Bred on <keys>.",
            "--template",
            ROOT / "resources" / "report.html.jinja",
        ]
        command += ["--thresholds", json.dumps(DEFAULT["gate"] | {"passkey_rate": 0.95})]
        command += ["--html", out / "report.html", "--json", out / "report.json"]
        command += ["--figures", out / "figures"]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    done = Run(root).report(root / "out")
    assert done.returncode == 0, done.stderr
    return root / "out"


def test_the_json_holds_what_was_promised(made):
    report = json.loads((made / "report.json").read_text())
    assert set(report["perplexity"]) == set(report["passkey"]) == {"base", "yarn", "trained"}
    for points in report["perplexity"].values():
        assert set(points) == {"512", "4096"}
        for point in points.values():
            assert set(point) == {"value", "low", "high", "window_mean"}
            assert point["low"] <= point["value"] <= point["high"]
    for protocol in ("truncate", "by_position", "sliding"):
        assert report[f"perplexity_{protocol}"] == report["perplexity"]
    assert report["harness"] == dict.fromkeys(("base", "yarn", "trained"), TASKS)
    cell = report["passkey"]["trained"]["4096"]["0.5"]
    assert set(cell) == {"successes", "trials", "low", "high"} and cell["successes"] == 30
    assert report["passkey_by_length"]["base"]["4096"]["trials"] == 90
    mix = report["mix"]
    assert mix["checked"] and mix["tokens_in"] == (
        mix["tokens_packed"] + mix["tails_dropped"] + mix["unused_by_the_mix"] + mix["held_out"]
    )
    assert mix["long_tokens"] + sum(mix["short_tokens"].values()) == mix["tokens_packed"]
    assert report["rope"]["factor"] == 8 and report["rope"]["target_length"] == 4096
    assert report["verdict"]["headline"] == "All 5 checks pass" and report["warnings"] == []
    assert report["chain"] == {"links": 31, "broken": 0}
    assert report["timings"]["train"] == {"seconds": 12.5, "peak_memory_mb": 300.25}
    assert report["timings"]["merge"] == {"seconds": 0.3, "peak_memory_mb": None}
    assert [document["scored"] for document in report["held_out"]] == [1000] * 6
    assert report["code"]["report"] == code_hash(ROOT / "scripts" / "report.py")


def test_every_key_is_documented(made):
    """docs/report.md has every key of report.json, except names of variants, lengths and settings."""
    report = json.loads((made / "report.json").read_text())
    text = (ROOT / "docs" / "report.md").read_text()
    inner = ("verdict", "model", "rope", "corpus", "mix", "training", "chain")
    keys = set(report).union(*(report[part] for part in inner))
    keys |= set(report["comparisons"][0]) | set(report["comparisons"][0]["perplexity"])
    keys |= set(report["verdict"]["checks"][0]) | set(report["held_out"][0])
    keys |= set(report["rope"]["variants"]["yarn"]) | set(report["timings"]["train"])
    keys |= set(report["harness"]["base"]["ruler_vt"])
    keys |= set(report["mix"]["collections"]["x"]) | set(report["mix"]["piece_lengths"][0])
    assert sorted(key for key in keys if f"`{key}`" not in text) == []
    assert [name for name in verdict.CHECKS if f"`{name}`" not in text] == []


def test_no_path_of_this_machine_is_told(made):
    for name in ("report.json", "report.html"):
        text = (made / name).read_text()
        assert str(made.parent) not in text and "/models/" not in text
    assert json.loads((made / "report.json").read_text())["model"]["source"] == "tiny"


class Elements(HTMLParser):
    """The tags, attributes and ids of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.references, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.references += [
            (tag, found[name])
            for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
            if name in found
        ]
        if "id" in found:
            self.ids.append(found["id"])


def test_the_page_needs_no_other_file(made):
    text = (made / "report.html").read_text()
    page = Elements()
    page.feed(text)
    outside = [
        (tag, target)
        for tag, target in page.references
        if not target.startswith(("#", "data:")) and tag != "a"
    ]
    assert outside == []
    assert not {"script", "link", "iframe", "object", "embed", "image"} & set(page.tags)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert page.tags.count("svg") == 6 + 3, "six figures, and a passkey panel a variant"
    assert len(page.ids) == len(set(page.ids)), "the figures share ids"
    targets = {target[1:] for _, target in page.references if target.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert targets <= set(page.ids)
    assert '<th>ruler_vt</th><td>2048</td><td class="n">0.5000 <span' in text
    assert "Bred on &lt;keys&gt;." in text, "the disclosure is shown, escaped"
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert used <= set(re.findall(r"--([\w-]+):", text)), "a color is used but not defined"


def test_each_figure_lies_beside_the_page(made):
    names = {"perplexity", "by_position", "truncate", "passkey", "loss", "rope", "mix"}
    files = sorted((made / "figures").iterdir())
    assert {file.name for file in files} == {f"{name}.png" for name in names}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_the_report_is_the_same_twice(made, tmp_path):
    assert Run(tmp_path).report(tmp_path / "out").returncode == 0
    again = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    # All but the record of when the report was made.
    again.remove(tmp_path / "out/environments/report.json")
    assert len(again) == 9
    for path in again:
        assert path.read_bytes() == (made / path.relative_to(tmp_path / "out")).read_bytes(), path


def test_a_protocol_that_was_not_made_is_not_shown(tmp_path):
    run = Run(tmp_path)
    for variant in run.variants:
        path = tmp_path / f"perplexity/{variant}.json"
        record = json.loads(path.read_text())
        for protocol in ("truncate", "by_position", "sliding"):
            del record["facts"][protocol]
        path.write_text(json.dumps(record))
    done = run.report(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["perplexity"] and report["perplexity_sliding"] == {}
    assert not (tmp_path / "out/figures/truncate.png").exists()
    text = (tmp_path / "out" / "report.html").read_text()
    assert "by position" not in text and "truncated" not in text and "that slide by" not in text


@pytest.mark.parametrize("variants", [("base",), ("trained",), ("base", "yarn")])
def test_the_report_copes_with_fewer_variants(tmp_path, variants):
    done = Run(tmp_path, variants).report(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["verdict"]["checks"]) == 2 and len(report["verdict"]["not_checked"]) == 3


def test_manifests_of_different_runs_are_noticed(tmp_path):
    run = Run(tmp_path)
    run.write("corpus", "download_corpus", {"documents": 8, "characters": 80})
    assert run.report(tmp_path / "out").returncode == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["chain"]["broken"] == 1
    assert "tokenise was made from another download_corpus" in report["warnings"][0]


def test_a_manifest_of_another_stage_is_refused_in_one_sentence(tmp_path):
    run = Run(tmp_path)
    run.write("merge", "train", {})
    done = run.report(tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "is the manifest of 'train', not of 'merge'" in done.stderr
    assert not (tmp_path / "out" / "report.html").exists()
