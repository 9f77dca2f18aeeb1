"""Sweeps: cells are full configurations, shared work is done once, and one table compares them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT
from stages import refusal, rope_facts, run
from test_config import DEFAULT, SCHEMA_PATH
from test_config import refusal as config_refusal
from test_report import grid, perplexity_facts

import sweep as stage
import verify
from longyarn.config import sweep_cells
from longyarn.config.load import complete
from longyarn.core import manifest
from longyarn.core.files import read_json, write_json
from longyarn.provenance import checksums
from longyarn.provenance.verification import Run

SEEDS = [{"mix.seed": 1, "training.seed": 1}, {"mix.seed": 2, "training.seed": 2}]


def swept(factors: dict, design: str = "one_at_a_time") -> dict:
    return DEFAULT | {"sweep": {"design": design, "factors": factors}}


def names(factors: dict, design: str = "one_at_a_time") -> list[str]:
    return list(sweep_cells.cells(swept(factors, design)))


def test_one_at_a_time_each_cell_differs_in_one_value():
    found = sweep_cells.cells(swept({"training.steps": [50, 75], "rope.method": ["ntk"]}))
    # The default has 75 steps, so that value makes no cell of its own.
    assert list(found) == ["", "cells/training.steps=50/", "cells/rope.method=ntk/"]
    few = found["cells/training.steps=50/"]
    assert few["training"] == DEFAULT["training"] | {"steps": 50}
    assert few["rope"] == DEFAULT["rope"] and few["sweep"]["factors"] == {}
    assert DEFAULT["training"]["steps"] == 75


def test_a_grid_has_every_combination_once():
    factors = {"training.steps": [50, 75], "rope.method": ["yarn", "ntk"], "mix.seed": [0, 1, 2]}
    found = names(factors, "grid")
    assert len(found) == len(set(found)) == 12
    assert "cells/mix.seed=2+rope.method=ntk+training.steps=50/" in found


@pytest.mark.parametrize("design", ["one_at_a_time", "grid"])
def test_a_factor_more_renames_no_cell(design):
    factors = {"training.steps": [75, 50], "seeds": [{"mix.seed": 0}, *SEEDS]}
    more = factors | {"rope.method": ["yarn", "ntk"]}
    assert set(names(factors, design)) < set(names(more, design))


def test_names_are_short_and_safe_in_a_path():
    long = {f"training.lora.{key}": True for key in ("train_embeddings", "train_norms", "rslora")}
    for changes in (long, {"mix.short_from": ["a b", "c/d"]}, {"mix.shares": {"kjv": 1.0}}):
        name = sweep_cells.directory(changes)
        assert len(name) < 80 and name.count("/") == 2
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_+-/")
    others = ({"mix.shares": {"kjv": 0.5}}, {"mix.shares": {"kjv": 0.7}})
    assert sweep_cells.directory(others[0]) != sweep_cells.directory(others[1])
    assert sweep_cells.directory({"mix.long_share": 0.6}) == "cells/mix.long_share=0.6/"


def test_a_stage_lies_where_the_changes_that_decide_on_it_say():
    factors = {
        "training.steps": [50], "mix.seed": [1], "x": [{"mix.seed": 1, "training.seed": 1}],
        "rope.method": ["ntk"], "rope.beta_fast": [16],
        "y": [{"mix.seed": 2, "training.seed": 2}],
    }  # fmt: skip
    found = {
        stage: [
            sweep_cells.directory(sweep_cells.shared(changes, stage))
            for changes in sweep_cells.all_changes(swept(factors))
        ]
        for stage in ("patch_rope", "pack")
    }
    seed, ntk, ramp, other = (
        f"cells/{name}/"
        for name in ("mix.seed=1", "rope.method=ntk", "rope.beta_fast=16", "mix.seed=2")
    )
    assert found["patch_rope"] == ["", "", "", "", "", ramp, ""]
    assert found["pack"] == ["", "", seed, seed, ntk, ramp, other]
    # Even if no cell has only that change, and whatever other cells there are.
    assert sweep_cells.places(swept(factors))[other] == {"mix.seed": 2}
    assert other not in sweep_cells.cells(swept(factors))


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({"training.stepz": [1]}, "in training.stepz=1 of config key 'sweep': config key 'training.st"),
        ({"training.steps": [0]}, "in training.steps=0 of config key 'sweep': config key 'training.s"),
        ({"training.steps": [100]}, "in training.steps=100 of config key 'sweep': training.steps ×"),
        ({"training.gpus": [2]}, "training.gpus is that of the whole run"),
        ({"training.steps.x": [1]}, "sweep.factors changes training.steps.x, but steps is not a section"),
        ({"paths.work": ["a"]}, "which changes 'paths.work', and a sweep changes keys of rope, mix"),
        ({"evaluation.threads": [2]}, "changes 'evaluation.threads', and a sweep changes keys of"),
        ({"corpus": [{"corpus.held_out": []}]}, "changes 'corpus.held_out'"),
        ({"seeds": [1, 2]}, "sweep.factors has 'seeds', which changes 'seeds'"),
        ({"training.steps": []}, "must not be empty"),
        ({"x": [{"training.lora": {"rank": 4}}]}, "gives training.lora a mapping; write its keys one by"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_is_refused_by_name(factors, words):
    assert words in config_refusal(DEFAULT, {"sweep.factors": factors})


def test_two_factors_of_a_grid_do_not_change_one_key():
    factors = {"mix.seed": [1], "seeds": SEEDS}
    words = config_refusal(DEFAULT, {"sweep": {"design": "grid", "factors": factors}})
    assert "two factors of sweep.factors change mix.seed, the second is 'seeds'" in words


def test_a_sweep_and_phases_do_not_go_together():
    phases = [{"rope": {"target_length": 1024}}]
    assert "set phases to []" in config_refusal(
        DEFAULT, {"sweep.factors": {"mix.seed": [1]}, "phases": phases}
    )


@pytest.mark.parametrize("preset", sorted((ROOT / "presets/sweeps").glob("*.yaml")))
def test_presets_are_valid(preset):
    made = complete(DEFAULT | yaml.safe_load(preset.read_text()), SCHEMA_PATH)
    assert 10 < len(sweep_cells.cells(made)) <= 30


# The table, on invented figures.


def made(directory, values: dict) -> list:
    """Write manifests of a run; ``values`` has each cell's perplexity and keys found (of 30) at 4096."""
    for changes, (perplexity, keys) in values.items():
        place = directory / sweep_cells.directory(dict(changes))
        of = {512: 31.0, 4096: perplexity}
        for name, facts in (
            ("trained", {"tokens_seen": 614400}),
            ("perplexity/trained", perplexity_facts(of)),
            ("passkey/trained", {"grid": grid({512: 30, 4096: keys})}),
        ):
            write_json(place / f"{name}.json", {"facts": facts})
    write_json(directory / "rope.json", {"facts": rope_facts()})
    (directory / "benchmarks").mkdir()
    (directory / "benchmarks/train.tsv").write_text("s\tmax_rss\n75.0\t300\n")
    cells = json.dumps([dict(changes) for changes in values])
    outputs = {
        "json": "sweep.json", "page": "sweep.md", "png": "sweep.png", "svg": "sweep.svg",
    }  # fmt: skip
    words = ["--rope", directory / "rope.json", "--cells", cells]
    places = [directory / sweep_cells.directory(dict(changes)) for changes in values]
    for stage_, name in (
        ("train", "trained"), ("perplexity", "perplexity/trained"), ("passkey", "passkey/trained"),
    ):  # fmt: skip
        words += [f"--{stage_}", *(place / f"{name}.json" for place in places)]
    words += ["--benchmarks", directory / "benchmarks"]
    return [*words, *(part for k, v in outputs.items() for part in (f"--{k}", directory / v))]


def test_cells_are_compared_with_the_default(tmp_path):
    better, same, other = (("training.steps", 400),), (("mix.seed", 1),), (("mix.seed", 2),)
    values = {(): (31.0, 29), better: (28.0, 30), same: (31.0, 28), other: (31.3, 10)}
    arguments = made(tmp_path, values)
    run(stage, *arguments)
    found = read_json(tmp_path / "sweep.json")
    assert list(found["cells"]) == ["default", "training.steps=400", "mix.seed=1", "mix.seed=2"]
    at = {name: cell["figures"]["4096"] for name, cell in found["cells"].items()}
    assert at["training.steps=400"]["perplexity_ratio"]["value"] == pytest.approx(28 / 31, rel=1e-3)
    assert at["training.steps=400"]["perplexity_ratio"]["significant"]
    assert at["mix.seed=1"]["perplexity_ratio"]["value"] == 1
    assert at["mix.seed=2"]["passkey_difference"]["significant"]
    assert found["seeds"]["cells"] == ["default", "mix.seed=1", "mix.seed=2"]
    spread = found["seeds"]["4096"]
    assert (
        spread["perplexity"]["low"] < spread["perplexity"]["high"] == pytest.approx(31.3, rel=1e-2)
    )
    assert spread["passkey"]["low"] == pytest.approx(1 / 3)
    assert spread["passkey"]["deviation"] == pytest.approx(
        0.3564, abs=1e-4
    )  # of 29, 28 and 10 in 30
    assert "1 have a significantly lower perplexity (training.steps=400)" in found["sentence"]
    assert "over 3 seeds of the default, perplexity lies between" in found["sentence"]
    page = (tmp_path / "sweep.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 4 and len({row.count("|") for row in rows}) == 1
    assert "614,400 | 1 min 15 s" in rows[2] and "90 of 90" in rows[3]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "sweep.svg").read_text()
    assert "training.steps=400" in svg and "band: seeds" in svg
    first = {
        name: (tmp_path / name).read_bytes() for name in ("sweep.md", "sweep.svg", "sweep.png")
    }
    run(stage, *arguments)
    assert all((tmp_path / name).read_bytes() == content for name, content in first.items())


def test_without_seeds_their_spread_is_said_to_be_unknown(tmp_path):
    run(stage, *made(tmp_path, {(): (31.0, 29), (("training.steps", 50),): (33.0, 29)}))
    assert read_json(tmp_path / "sweep.json")["seeds"] is None
    assert "how much another seed changes is unknown" in (tmp_path / "sweep.md").read_text()


def test_a_sweep_without_factors_is_refused(tmp_path):
    assert "sweep.factors has nothing that differs" in refusal(
        stage, *made(tmp_path, {(): (31.0, 29)})
    )


# The DAG.

OF_24 = {
    "design": "grid",
    "factors": {
        "training.learning_rate": [1.0e-3, 5.0e-4, 2.0e-3],
        "mix.long_share": [0.8, 0.6],
        "rope.method": ["yarn", "ntk"],
        "training.lora.rank": [4, 8],
    },
}


def test_what_24_cells_share_is_planned_once(workspace):
    planned = workspace.planned({"sweep": OF_24}, "sweep")
    assert planned == {
        "download_model": 1, "download_corpus": 1, "tokenise": 1, "sweep": 1,
        "patch_rope": 2,  # yarn and ntk
        "pack": 4,  # long share × method
        "train": 24, "merge": 24, "perplexity": 24, "passkey": 24,
    }  # fmt: skip


def test_a_finished_run_is_the_default_cell(finished):
    factors = {"training.learning_rate": [5.0e-4], "mix.seed": [1]}
    assert finished.planned({"sweep": {"factors": factors}}, "sweep") == {
        "pack": 1, "train": 2, "merge": 2, "perplexity": 2, "passkey": 2, "sweep": 1,
    }  # fmt: skip
    # Of the run itself only the seal is made again, because it contains the configuration.
    assert finished.planned({"sweep": {"factors": factors}}) == {"provenance": 1}


def test_what_cells_share_is_packed_for_their_steps_not_for_the_run_s(finished_copy):
    """The run reads 8192 tokens; the cell has 4096 and reads 2048 of them."""
    overrides = {"sweep": {"factors": {"x": [{"training.steps": 1, "mix.token_budget": 4096}]}}}
    target = "results/tests/cells/mix.token_budget=4096/pack.json"
    assert finished_copy.planned(overrides, "sweep")["pack"] == 1
    finished_copy.snakemake(target, overrides=overrides)
    facts = manifest.read(finished_copy.directory / target)["facts"]
    assert facts["tokens_packed"] == 4096


def test_a_killed_sweep_goes_on_with_what_is_missing(finished_copy):
    overrides = {"sweep": {"factors": {"training.learning_rate": [5.0e-4, 2.0e-3]}}}
    made = finished_copy.directory / "results" / "tests"
    every = finished_copy.planned(overrides, "sweep")
    assert every == {
        "train": 2, "merge": 2, "perplexity": 2, "passkey": 2, "sweep": 1,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", "config.yaml", "tests/config.yaml",
        "overrides.yaml", "--", "sweep",
    ]  # fmt: skip
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    started = subprocess.Popen(
        command, cwd=finished_copy.directory, env=os.environ | {"PATH": path},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        # When the second cell starts to train, Snakemake has recorded the first one.
        while len(list(made.glob("logs/cells/*/train.log"))) < 2:
            assert started.poll() is None, "the sweep ended before it could be killed"
            time.sleep(0.05)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    (kept,) = made.glob("cells/*/trained.json")
    before = (kept.read_bytes(), kept.stat().st_mtime_ns)
    finished_copy.snakemake("--unlock")
    left = finished_copy.planned(overrides, "sweep")
    assert left["train"] == 1 and left["sweep"] == 1
    assert all(left[rule] <= every[rule] for rule in every)
    finished_copy.snakemake("sweep", overrides=overrides)
    assert (kept.read_bytes(), kept.stat().st_mtime_ns) == before
    assert finished_copy.planned(overrides, "sweep") == {}
    found = read_json(made / "sweep.json")
    assert list(found["cells"]) == [
        "default", "training.learning_rate=0.0005", "training.learning_rate=0.002",
    ]  # fmt: skip
    assert all(cell["train_seconds"] > 0 for cell in found["cells"].values())
    finished_copy.run([*command[:3], "--report", "sweep.html", *command[5:]])
    page = (finished_copy.directory / "sweep.html").read_text()
    assert all(f"results/tests/sweep.{ending}" in page for ending in ("md", "png"))
    # The sealed run does not include the sweep; when it is sealed again, it does.
    assert verify.findings(Run(made)) == []
    finished_copy.snakemake(overrides=overrides)
    assert verify.findings(Run(made)) == [] and "sweep.json" in checksums.read(made)
    assert (made / "sweep.md").is_file()
