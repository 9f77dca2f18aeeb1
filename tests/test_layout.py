"""Where jobs read and write, and what their commands say, without Snakemake."""

import inspect
import json
import shlex
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_config import DEFAULT, SCHEMA_PATH, changed

from longyarn.config.load import complete
from longyarn.core.errors import UserError
from longyarn.core.files import write_json
from longyarn.workflow import incomplete, options
from longyarn.workflow.layout import Layout, files_of, phase_name, trained_rope, workflow_file

RUN = "results/micro"


def layout(**changes) -> Layout:
    """Return the layout of the default configuration with other values at dotted keys."""
    config = DEFAULT
    for key, value in changes.items():
        config = changed(config, key.replace("__", "."), value)
    return Layout(complete(config, SCHEMA_PATH))


def test_the_run_itself():
    made = layout()
    assert (made.run, made.base(), made.pack()) == (RUN, f"{RUN}/base", f"{RUN}/pack")
    assert made.rope() == f"{RUN}/rope/yarn"
    assert made.weights_of("yarn") == made.weights_of("base") == f"{RUN}/base"
    assert made.weights_of("trained") == f"{RUN}/merged"
    assert made.weights_of("step-20") == f"{RUN}/step-20/merged"
    assert made.rope_of("step-20") == made.rope_of("trained") == f"{RUN}/rope/yarn"
    assert made.rope_of("ntk") == f"{RUN}/rope/ntk"
    assert f"{RUN}/verified.json" in made.products()
    assert made.downloads() == [
        f"{RUN}/{name}" for name in ("base.json", "base", "corpus.json", "corpus")
    ]
    assert made.reported_phases() == made.reported_models() == made.evaluations("harness") == {}
    assert made.evaluations("passkey")["base"] == f"{RUN}/passkey/base"


def test_a_phase_starts_from_the_model_of_the_one_before():
    made = layout(phases=[{"rope": {"target_length": 1024}}, {"rope": {"target_length": 2048}}])
    first, second = "phase-1/", "phase-2/"
    assert made.base(first) == f"{RUN}/base"
    assert made.base(second) == f"{RUN}/phase-1/merged"
    assert made.base() == f"{RUN}/phase-2/merged"
    assert made.rope(second) == f"{RUN}/phase-2/rope/yarn"
    assert made.pack(first) == f"{RUN}/phase-1/pack"
    assert made.configuration(second)["rope"]["target_length"] == 2048
    assert made.reported_phases()["phase-1/train"] == f"{RUN}/phase-1/trained"
    assert len(made.reported_phases()) == 8


def test_cells_share_what_is_the_same():
    made = layout(sweep={"factors": {"training.steps": [20], "mix.seed": [7]}})
    steps, seed = "cells/training.steps=20/", "cells/mix.seed=7/"
    assert {"", steps, seed} == set(made.cells)
    assert made.pack(steps) == f"{RUN}/pack"
    assert made.pack(seed) == f"{RUN}/{seed}pack"
    assert (
        made.rope(seed) == made.rope(steps) == made.rope_of("trained", seed) == f"{RUN}/rope/yarn"
    )
    assert made.weights_of("trained", seed) == f"{RUN}/{seed}merged"
    assert made.base(seed) == f"{RUN}/base"


def test_variants_with_weights_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {
        "evaluation__variants": ["base", "trained", "other", "theirs"],
        "evaluation__more_variants": {"other": {"run": "earlier"}, "theirs": {"source": "a/b"}},
    }
    with pytest.raises(UserError, match=r"needs results/earlier/merged\.json, which is missing"):
        layout(**changes)
    earlier = tmp_path / "results" / "earlier"
    write_json(earlier / "rope" / "ntk.json", {"facts": {}})
    from longyarn.core.files import sha256

    write_json(earlier / "merged.json", {"inputs": {"rope": sha256(earlier / "rope/ntk.json")}})
    made = layout(**changes)
    assert made.weights_of("other") == "results/earlier/merged"
    assert made.rope_of("other") == "results/earlier/rope/ntk"
    assert made.weights_of("theirs") == f"{RUN}/models/theirs"
    assert made.reported_models() == {
        "other": "results/earlier/merged",
        "theirs": f"{RUN}/models/theirs",
    }
    assert made.source_of("theirs")["source"] == "a/b"
    assert f"{RUN}/models/theirs" in made.downloads()
    assert made.source_of()["source"] == DEFAULT["model"]["source"]


def test_names_of_jobs():
    assert phase_name(SimpleNamespace(phase="phase-1/")) == "phase-1/"
    assert phase_name(SimpleNamespace(phase="step-20/")) == ""
    assert phase_name(SimpleNamespace()) == ""
    assert trained_rope(changed(DEFAULT, "rope.method", "none")) == "base"


def test_a_file_of_the_workflow_is_relative_where_it_lies_below(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert workflow_file("scripts/pack.py") == "scripts/pack.py"
    monkeypatch.chdir(tmp_path)
    assert workflow_file("scripts/pack.py") == str(ROOT / "scripts/pack.py")


def test_files_of_a_local_model():
    base = ROOT / "resources/micro-base"
    assert files_of(str(base), ("config.json", "*.safetensors")) == [
        f"{base}/config.json", f"{base}/model.safetensors",
    ]  # fmt: skip
    assert files_of("an/owl", ("*",)) == []


def test_an_unrecorded_param_is_one_that_snakemake_leaves_out():
    """Snakemake does not record functions that take `output`."""
    from snakemake.rules import Rule

    param = options.unrecorded("--flag")
    assert Rule._is_deriving_function(param)
    assert list(inspect.signature(param).parameters) == ["wildcards", "output"]
    assert param(None, None) == "--flag"
    wildcards = SimpleNamespace(phase="phase-1/")
    assert options.unrecorded(lambda wildcards: wildcards.phase)(wildcards, None) == "phase-1/"


def test_settings_pass_the_shell():
    (said,) = shlex.split(options.as_json({"a": "it's", "b": "ü"}))
    assert json.loads(said) == {"a": "it's", "b": "ü"}
    assert options.unless_null("--revision", None) == ""
    assert options.unless_null("--revision", "a b") == "--revision 'a b'"
    assert options.named({"base": "r/base"}) == ["base=r/base.json"]


def test_options_of_pack_and_training():
    made = layout()
    assert "--document-masks --seed 0" in options.mix(made.config)
    assert options.tokens_to_read(made, "").startswith("--read ")
    assert options.tokens_to_read(layout(training__steps=None, training__epochs=1), "") == ""
    assert {"source", "revision"}.isdisjoint(options.training(made.config))
    assert options.on_every_node(made.config) == ""
    assert options.training_nodes(made.config) == {"nodes": 1}


def test_lengths_that_are_not_stated_follow_from_the_target_alone():
    """The original length of a model that is not downloaded yet is no option, or jobs would run again."""
    config = layout().config
    assert options.lengths(config, "passkey") == "--lengths 512 1024 2048 4096"
    assert options.derived_lengths(config, "perplexity") == ""
    config = layout(evaluation__passkey__lengths=None).config
    assert options.lengths(config, "passkey") == "--target 4096"
    assert "--passkey-lengths" not in options.evaluation_checks(config)
    assert "--target 4096" in options.evaluation_checks(config)
    rope = config["rope"] | {"original_max_position_embeddings": 1024}
    assert options.lengths(config | {"rope": rope}, "passkey") == "--target 4096 --original 1024"


def test_training_on_several_machines():
    config = DEFAULT | {
        "training": DEFAULT["training"] | {"nodes": 2, "gpus": 4, "threads": 2},
        "hardware": DEFAULT["hardware"] | {"slurm_gpu_type": "a100"},
    }
    assert options.training_threads(config) == 8
    assert options.gpu_model(config) == {"gpu_model": "a100"}
    asked = options.training_nodes(config)
    assert asked["tasks"] == asked["nodes"] == 2
    assert asked["slurm_extra"] == "--gpus-per-node=a100:4"
    assert options.on_every_node(config) == (
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=8 --kill-on-bad-exit=1"
        " --gpus-per-node=a100:4"
    )


def test_results_whose_payload_is_not_complete(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "a").write_text("12345")
    entry = {"files": {"pack/a": {"size": 5, "sha256": "0"}}}
    write_json(tmp_path / "pack.json", entry)
    write_json(tmp_path / "report.json", {})  # without payload
    (tmp_path / "workflow" / "training").mkdir(parents=True)  # the sealed copy of the workflow
    write_json(tmp_path / "workflow" / "training.json", {})
    assert incomplete.incomplete(tmp_path) == {}
    (tmp_path / "pack" / "a").write_text("123")
    (found,) = incomplete.incomplete(tmp_path).items()
    assert found == (tmp_path / "pack.json", found[1])
    assert "has 3 bytes" in found[1]
    incomplete.set_aside([tmp_path / "pack.json"])
    assert not (tmp_path / "pack.json").exists()
    assert (tmp_path / "pack.json.incomplete").is_file()
