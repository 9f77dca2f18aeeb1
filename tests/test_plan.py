"""The plan before paying: what it says, what it refuses and advises, and every request to SLURM."""

import concurrent.futures
import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from stages import one_sentence

from longyarn.cluster import hardware, plan_advice, plan_table, slurm_requests
from longyarn.config.layers import layered
from longyarn.config.load import complete
from longyarn.core.errors import UserError

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
needs_plugin = pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import snakemake_executor_plugin_slurm"], capture_output=True
    ).returncode
    != 0,
    reason="SLURM's executor plugin is not installed; `make setup-slurm` does it",
)


def make_plan(workspace, overrides: dict | None = None, *arguments: str):
    """Run the program as `make plan` does."""
    if overrides is not None:
        (workspace.directory / "mine.yaml").write_text(json.dumps(overrides))
        arguments = ("--configfile", "config.yaml", "mine.yaml", *arguments)
    return subprocess.run(
        [sys.executable, "scripts/plan.py", *arguments],
        cwd=workspace.directory,
        capture_output=True,
        text=True,
    )


def llama(shape: str, length: int = 32768, **training) -> dict:
    """Return a configuration of a model that is nowhere."""
    default = {"precision": "bf16", "batch_size": 64, "gpus": 1, "gradient_checkpointing": True}
    return {
        "model": {"source": "owner/name", "shape": shape},
        "rope": {"target_length": length},
        "mix": {"token_budget": None},
        "training": default | {"attention": "flash_attention_2", "loss": "stock"} | training,
        "evaluation": {"precision": "bf16", "attention": "flash_attention_2"},
        # The default's lengths do not have this target.
        "gate": {"perplexity_ratio": None, "retention_ratio": None, "passkey_rate": None},
    }


def configuration(overrides: dict) -> dict:
    from snakemake.utils import update_config

    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    update_config(config, overrides)
    return complete(config, ROOT / "schemas/config.schema.yaml")


@needs_plugin
def test_the_committed_table_is_what_snakemake_would_submit(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (ROOT / "docs/requests.md").read_text() == slurm_requests.document(
        slurm_requests.DEFAULT_PROFILE
    ), "run `python scripts/plan.py --document > docs/requests.md`"


@needs_plugin
def test_overrides_of_the_profile_count(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    profile["default-resources"] |= {
        "slurm_partition": "long", "slurm_account": "mine", "gpu_model": "a100",
    }  # fmt: skip
    profile["set-resources"] = {"train": {"runtime": 77, "mem_mb": 123456}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(profile))
    config = layered(ROOT / "presets/llama2-7b-32k.yaml")
    train = dict(slurm_requests.submissions(config, tmp_path))["train"]
    for part in ("-A mine", "-p long", "-t 77", "--mem 123456", "--gpus=a100:8"):
        assert part in train


@needs_plugin
@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        ("no-such-key: 1", "no-such-key"),
        ("set-resources: text", "fix it"),
        ("jobs: many", "must be integer"),
        ("jobs: 1\nset-resources: {train: {runtime: soon}}", "'runtime' with value 'soon'"),
        ("jobs: 1\nset-resources: {train: {mem_mb: 200G}}", "'mem_mb' assigned .* '200G'"),
        ("jobs: 1\nset-threads: {train: many}", "Threads must be given as an int"),
    ],
)
def test_a_broken_profile_is_one_sentence(workspace, profile, reason):
    (workspace.directory / "profiles/slurm/config.yaml").write_text(profile + "\n")
    done = make_plan(workspace)
    assert done.returncode == 1
    said = one_sentence(done.stderr)
    assert said.startswith("error: profiles/slurm/config.yaml is refused by Snakemake")
    assert re.search(reason, said)


BROKEN = {
    "a list": (b"- run", "is not a mapping"),
    "text": (b"run", "is not a mapping"),
    "no YAML": (b"run: [", "is not valid YAML"),
    "latin-1": ("run: h\u00e9".encode("latin-1"), "is not UTF-8"),
    "a directory": (None, "cannot be read"),
    "paths without a value": (b"paths:", "config key 'paths' is null"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_config_file_is_one_sentence_in_the_plan_and_in_an_image(tmp_path, case):
    content, sentence = BROKEN[case]
    file = tmp_path / "mine.yaml"
    file.mkdir() if content is None else file.write_bytes(content)
    for command in (
        ["scripts/plan.py", "--configfile", "config.yaml", file],
        ["containers/build.py", "sif", "--image", "cpu", "--config", "config.yaml", file],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert sentence in one_sentence(done.stderr)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_fit_and_say_what_they_are(preset):
    config = layered(preset)
    plan_advice.check_fit(config)
    assert config["run"] == preset.stem
    assert "NEVER RUN ON A GPU BY US" in preset.read_text()
    for part in ("tokens", "most at once", "train", "checkpoints"):
        assert part in plan_table.costs(config)


def leaves(value: dict, prefix: str = ""):
    """Yield the dotted key and the value of each setting of a config."""
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_state_only_what_is_particular_about_the_model(preset):
    text = preset.read_text()
    stated = yaml.safe_load(text)
    assert len(text.splitlines()) <= 45
    least = {"run": "x", "model": {"source": "x"}, "rope": {"target_length": 4096}}
    least["corpus"] = {"files": [{"collection": "x", "files": "x"}]}
    default = dict(leaves(complete(least, ROOT / "schemas/config.schema.yaml")))
    for key, value in leaves(stated):
        assert default.get(key) != value, key
    for source in stated["corpus"]["datasets"]:
        assert re.fullmatch("[0-9a-f]{40}", source["revision"]) and source["licence"]


def test_presets_pass_a_dry_run(workspace):
    """All of them, two at a time."""

    def dry_run(preset):
        command = [sys.executable, "-m", "snakemake", "-n", "--cores", "8", "--configfile", preset]
        return workspace.run(command)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for preset, done in zip(PRESETS, pool.map(dry_run, PRESETS), strict=True):
            assert "rule train:" in done.stdout, preset.name


CORPORA = sorted((ROOT / "presets" / "corpora").glob("*.yaml"))


@pytest.mark.parametrize("corpus", CORPORA, ids=lambda path: path.stem)
def test_corpora_go_on_top_of_each_preset(corpus):
    from snakemake.utils import update_config

    layer = yaml.safe_load(corpus.read_text())
    for preset in PRESETS:
        config = yaml.safe_load(preset.read_text())
        update_config(config, layer)
        filled = complete(config, ROOT / "schemas/config.schema.yaml")["corpus"]
        assert filled["datasets"][0]["collection"] == corpus.stem.replace("-", "_")
        assert sum(filled["held_out_documents"].values()) >= 8
        for source in filled["datasets"]:
            assert source["revision"] and source["licence"]


MINE = """\
run: mine-32k
model: {source: llama-2-7b}
rope: {target_length: 32768}
corpus:
  files: [{collection: books, files: books/*.txt}]
"""


@pytest.fixture
def mine(workspace):
    """A workspace with a configuration of five lines, and a config.yaml that nobody could read."""
    (workspace.directory / "config.yaml").write_text("run: [")
    (workspace.directory / "mine.yaml").write_text(MINE)
    (workspace.directory / "books").mkdir()
    (workspace.directory / "books" / "one.txt").write_text("A book.\n")
    shape = yaml.safe_load((ROOT / "resources/shapes.yaml").read_text())["llama-2-7b"]
    (workspace.directory / "llama-2-7b").mkdir()
    (workspace.directory / "llama-2-7b" / "config.json").write_text(json.dumps(shape))
    return workspace


def test_five_lines_are_a_complete_configuration_with_nothing_of_config_yaml(mine):
    done = mine.run(["python", "scripts/plan.py", "--configfile", "mine.yaml"])
    assert "838,860,800: 400 steps × 64 sequences × 32768" in done.stdout
    assert (
        "1 machine × 1 × a100-80gb" in done.stdout and "trained 291,246,080 (lora)" in done.stdout
    )
    done = mine.run(["snakemake", "-n", "--configfile", "mine.yaml"])
    assert "rule train:" in done.stdout and "results/mine-32k/report.html" in done.stdout
    done = mine.run(["snakemake", "-n"], check=False)
    assert "Config file is not valid" in done.stdout and done.returncode != 0


def test_the_default_is_planned_from_the_config_alone(workspace):
    """Nothing is written but Snakemake's own directory."""
    before = {path.name for path in workspace.directory.iterdir()}
    done = make_plan(workspace)
    assert done.returncode == 0, done.stderr
    assert "614,400: 75 steps × 2 sequences × 4096" in done.stdout
    assert {path.name for path in workspace.directory.iterdir()} - before <= {".snakemake"}


def test_the_rule_prints_the_same_plan(workspace):
    done = workspace.snakemake("plan")
    assert "8,192: 4 steps × 2 sequences × 1024" in done.stdout


def test_without_a_shape_there_is_no_plan(workspace):
    done = make_plan(workspace, {"model": {"source": "owner/name"}})
    assert done.returncode == 1
    assert re.search("shape of owner/name is unknown.*model.shape", one_sentence(done.stderr))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"model": {"shape": "gpt-5"}}, "model.shape gpt-5 is not in resources/shapes.yaml"),
        ({"hardware": {"gpu": "b300"}}, "hardware.gpu b300 is not in resources/gpus.yaml"),
        ({"hardware": {"gpu": "v100-32gb"}}, "hardware.gpu v100-32gb has no bf16"),
        ({"evaluation": {"attention": "flash_attention_2"}}, "evaluation.precision is fp32"),
        ({"training": {"steps": 10**10}}, "must be at most 1000000000"),
    ],
)
def test_unknown_names_are_one_sentence_also_in_a_run(workspace, overrides, sentence):
    overrides = {"training": {"gpus": 1, "precision": "bf16"}} | overrides
    done = make_plan(workspace, overrides)
    assert done.returncode == 1 and sentence in one_sentence(done.stderr)
    run = workspace.snakemake("-n", overrides=overrides, check=False)
    assert run.returncode == 1 and sentence in run.stdout and "Traceback" not in run.stdout


@pytest.mark.parametrize("section", ["training", "evaluation"])
@pytest.mark.parametrize(
    ("gpu", "gpus", "precision", "reason"),
    [
        ("a100-80gb", 0, "bf16", "training.gpus is 0"),
        ("v100-32gb", 1, "fp16", "hardware.gpu is v100-32gb"),
        ("a100-80gb", 1, "fp32", "{}.precision is fp32"),
        ("a100-80gb", 1, "fp16", None),
    ],
)
def test_flash_attention_needs_a_gpu_that_has_it(section, gpu, gpus, precision, reason):
    overrides = {"hardware": {"gpu": gpu}, "training": {"gpus": gpus}}
    flash = {"precision": precision, "attention": "flash_attention_2"}
    config = configuration(overrides | {section: overrides.get(section, {}) | flash})
    if reason is None:
        hardware.check(config)
        return
    reason = rf"^{section}\.attention flash_attention_2 needs .* but {reason.format(section)};"
    with pytest.raises(UserError, match=reason):
        hardware.check(config)


def test_a_local_model_with_broken_sizes_is_one_sentence(workspace):
    record = json.loads((ROOT / "resources/micro-base/config.json").read_text())
    (workspace.directory / "base").mkdir()
    file = workspace.directory / "base" / "config.json"
    file.write_text(json.dumps(record | {"num_attention_heads": 0}))
    done = make_plan(workspace, {"model": {"source": "base"}})
    assert done.returncode == 1
    assert "base/config.json has num_attention_heads 0" in one_sentence(done.stderr)
    run = workspace.snakemake("-n", overrides={"model": {"source": "base"}}, check=False)
    assert "Traceback" not in run.stdout and "ZeroDivisionError" not in run.stdout


def test_advice_of_a_shorter_context_takes_longer_lengths_along():
    # A batch of one sequence leaves nothing to share among several GPUs.
    overrides = llama("qwen2-7b", length=2**20, batch_size=1)
    overrides["rope"]["factor"] = 32
    overrides["evaluation"]["perplexity"] = {
        "lengths": [4096, 32768, 2**20], "tokens_per_document": 2**20,
        "truncate": {"lengths": [2**20, 2**18]}, "sliding": {"lengths": [2**20], "stride": 4096},
    }  # fmt: skip
    overrides["evaluation"]["passkey"] = {"lengths": [65536]}
    config = configuration(overrides)
    with pytest.raises(UserError) as refusal:
        plan_advice.check_fit(config)
    assert str(refusal.value).endswith(
        "rope.target_length 262144, rope.factor null, "
        "evaluation.perplexity.lengths [4096, 32768, 262144], "
        "evaluation.perplexity.truncate.lengths [262144], "
        "evaluation.perplexity.sliding.lengths [262144]"
    )
    fixed = plan_advice.shortened(config, 262144)
    assert plan_advice.apply(config, [fixed])["evaluation"]["perplexity"]["lengths"][2] == 262144
    assert plan_advice.apply(config, [{"rope.target_length": 262144}]) is None


def test_advice_is_no_setting_that_a_run_refuses():
    """From fp16 on an A10: a V100 is larger, but has no FlashAttention."""
    config = configuration(llama("llama-2-7b", precision="fp16") | {"hardware": {"gpu": "a10"}})
    assert {"hardware.gpu": "v100-32gb"} in plan_advice.remedies(config)
    assert plan_advice.apply(config, [{"hardware.gpu": "v100-32gb"}]) is None
    assert "v100" not in plan_advice.advice(config)


REFUSED = {
    "activations": (
        llama("llama-2-7b", gradient_checkpointing=False),
        ["training.gradient_checkpointing true"],
    ),
    "optimizer": (
        llama("llama-2-7b", length=8192, mode="full"),
        ["training.offload optimizer"],
    ),
    "weights": (
        llama("llama-2-70b", gpus=4, loss="chunked"),
        ["training.zero_stage 3", "training.activation_offload true"],
    ),
    "machines": (
        llama("llama-2-70b", gpus=8, mode="full", loss="chunked"),
        ["training.zero_stage 3", "training.offload optimizer", "training.nodes 2"],
    ),
    "logits": (llama("qwen2-7b"), ["training.loss chunked"]),
    "scores": (llama("llama-2-7b", attention="eager"), ["training.attention flash_attention_2"]),
    "length": (
        llama("qwen2-7b", length=131072),
        ["training.loss chunked", "training.activation_offload true"],
    ),
    "one sequence on several GPUs": (
        llama("qwen2-7b", length=2**19, loss="chunked", activation_offload=True, gpus=8),
        ["training.sp_size 4", "training.zero_stage 3"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_fit_is_refused_and_the_advice_fits(workspace, case):
    overrides, changes = REFUSED[case]
    done = make_plan(workspace, overrides)
    assert done.returncode == 1
    assert "sbatch" not in done.stdout
    said = one_sentence(done.stderr)
    assert said.rpartition(" with ")[2] == ", ".join(changes), said
    stated = (change.split(" ") for change in changes)
    changed = {key: yaml.safe_load(value) for key, value in stated}
    plan_advice.check_fit(plan_advice.apply(configuration(overrides), [changed]))


def test_where_nothing_helps_it_says_so():
    config = configuration(llama("llama-2-70b", length=2**26, batch_size=1))
    with pytest.raises(UserError, match="nothing in the config makes it fit"):
        plan_advice.check_fit(config)


def test_an_evaluation_that_cannot_fit_is_refused():
    config = configuration(llama("llama-2-7b") | {"hardware": {"gpu": "h200"}})
    config["evaluation"]["attention"] = "eager"
    config["evaluation"]["passkey"]["lengths"] = [32768]
    with pytest.raises(UserError, match=r"evaluation needs .*evaluation\.attention"):
        plan_advice.check_fit(config)
