"""The READMEs: a check for each of their commands, and lists that match the repository.

The commands are read from the READMEs, so a new one without a check here fails. There are three kinds of
checks, and the names of the tests say which one a command gets:

- run for real, in a copy of the repository
- planned: the command with ``-n``, so Snakemake reads the workflow and lists the jobs, and runs none
- recipe: ``make -n`` prints the commands behind a target, and runs none
"""

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Workspace
from test_structure import ORDER

from longyarn.config.load import complete

READMES = ("README.md", "README.zh.md")
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "[a-z]*/*.md", "profiles/*/*.md")
    for path in ROOT.glob(pattern)
)
MODEL, BOOKS = "/models/llama-2-7b", "/data/books"  # what mine.yaml names


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Return the contents of a document's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text(name), re.M | re.S)


def commands(name: str) -> list[str]:
    """Return the commands of a document's sh blocks, without their comments."""
    lines = "".join(blocks(name, "sh")).splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s+)#.*", "", line))]


def table(name: str, heading: str) -> list[str]:
    """Return the first cells of the table below a heading, without the table's own heading."""
    section = text(name).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| (.*?) \|", section, re.M)[2:]


def anchors(file: Path) -> set[str]:
    """Return the anchors that a document's headings have on GitHub."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The checks

RUN = (
    "source .venv/bin/activate",
    "make plan CONFIG=mine.yaml",
    "snakemake -n --configfile mine.yaml",
    "make verify RUN=results/micro",
)
PLANNED = {
    "snakemake --cores 16 --resources gpu=1 --configfile mine.yaml": "provenance",
    "snakemake --workflow-profile profiles/gpu --configfile mine.yaml": "provenance",
    "snakemake prefetch --workflow-profile profiles/slurm --configfile mine.yaml": "download_corpus",
    "snakemake --workflow-profile profiles/slurm --configfile mine.yaml": "provenance",
    "snakemake --cores 1 bundle": "bundle",
    "snakemake --cores 1 push": "push",
}
# Snakemake asks for the version of Apptainer before a dry run, too. The machine need not have it.
STAND_IN = "PATH=$PATH:tests/containers/bin "
RECIPES = {
    "make": "snakemake --cores 2",
    "make test": "python -m pytest tests",
    "make setup-slurm": "pip install .* -r envs/slurm.txt",
    "make sif IMAGE=cuda": "python containers/build.py --image cuda .*sif",
}


def set_up(workspace: Workspace) -> None:
    """Put into a workspace what its copy of the repository leaves out: the Makefile, ``.venv``."""
    shutil.copy(ROOT / "Makefile", workspace.directory)
    (workspace.directory / ".venv").symlink_to(sys.prefix, target_is_directory=True)


def shell(workspace: Workspace, command: str) -> str:
    """Run a command as a reader would, and return what it prints.

    make is told that ``.venv`` is up to date, because `make plan` would install packages otherwise.
    """
    command = re.sub(r"^make\b", "make -o .venv/.run", command)
    return workspace.run(["bash", "-c", command]).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Workspace:
    """A copy of the repository with mine.yaml, a directory of a 7B's shape without weights, and books."""
    workspace, elsewhere = (tmp_path_factory.mktemp(name) for name in ("checkout", "elsewhere"))
    workspace = Workspace(workspace)
    set_up(workspace)
    model, books = elsewhere / "model", elsewhere / "books"
    model.mkdir()
    shutil.copy(ROOT / "tests/families/llama-2-7b.json", model / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "resources/micro-base" / name, model)
    (model / "model.safetensors").touch()  # neither a plan nor a dry run reads weights
    books.mkdir()
    for number in range(20):
        (books / f"{number}.txt").write_text("A book.\n")
    mine = blocks("README.md", "yaml")[0]
    assert MODEL in mine and BOOKS in mine
    mine = mine.replace(MODEL, str(model)).replace(BOOKS, str(books))
    (workspace.directory / "mine.yaml").write_text(mine)
    return workspace


def test_each_command_has_a_check_and_each_check_a_command():
    assert sorted(commands("README.md")) == sorted((*RUN, *PLANNED, *RECIPES))


def test_both_readmes_have_the_same_commands_in_the_same_order():
    assert commands("README.zh.md") == commands("README.md")


def test_source_activate_is_run_for_real(checkout):
    said = shell(checkout, f"{RUN[0]} && command -v snakemake")
    assert Path(said.strip()).resolve() == Path(sys.prefix, "bin/snakemake").resolve()


def test_make_plan_of_mine_yaml_is_run_for_real(checkout):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    said = shell(checkout, RUN[1])
    assert "train: sbatch" in said
    hours = round(float(re.search(r"^ +train +\S+ +([\d.]+)", said, re.M)[1]))
    assert f" {hours} hours on one A100" in " ".join(text("README.md").split())
    assert f" {hours} 小时" in text("README.zh.md")


def test_the_dry_run_of_mine_yaml_is_run_for_real(checkout):
    said = shell(checkout, RUN[2])
    for stage in ("download_model", "pack", "train", "merge", "report", "provenance"):
        assert f"rule {stage}:" in said


def test_make_verify_is_run_for_real_on_the_run_of_the_test_configuration(finished_copy):
    set_up(finished_copy)
    said = shell(finished_copy, RUN[3].replace("micro", "tests"))
    assert "results/tests is whole" in said


@pytest.mark.parametrize("command", PLANNED)
def test_is_planned_with_n_and_not_run(checkout, command):
    if "slurm" in command:
        pytest.importorskip("snakemake_executor_plugin_slurm")
    said = shell(checkout, STAND_IN + command.replace("snakemake", "snakemake -n", 1))
    assert re.search(rf"^(local)?rule {PLANNED[command]}:$", said, re.M), said[-2000:]


@pytest.mark.parametrize("command", RECIPES)
def test_is_a_recipe_by_make_n_and_not_run(checkout, command):
    assert re.search(RECIPES[command], shell(checkout, command.replace("make", "make -n -B", 1)))


def test_make_help_is_run_for_real_and_names_each_target(checkout):
    said = shell(checkout, "make help")
    targets = re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.M)[1].split()
    assert [t for t in targets if not re.search(rf"^\s*(make )?{t}\b", said, re.M)] == []


def test_what_is_not_run_here_is_run_by_ci():
    """`make test` is a line of .ci/run.

    No test runs `make`, because it takes minutes. Other suites run the same chain with the smaller
    tests/config.yaml (fixture ``finished``), and a test above plans it with config.yaml.
    """
    assert "make test" in text(".ci/run").splitlines()


def test_the_readme_has_at_most_200_lines():
    assert len(text("README.md").splitlines()) <= 200


@pytest.mark.parametrize("name", ["config/README.md", "docs/your-model.md", *READMES])
def test_its_yaml_is_valid_by_the_schema(name):
    for block in blocks(name, "yaml"):
        config = {"run": "mine", "model": {"source": MODEL}, "rope": {"target_length": 32768}}
        complete(config | yaml.safe_load(block), ROOT / "schemas/config.schema.yaml")


def test_both_readmes_have_the_same_mine_yaml():
    assert blocks("README.zh.md", "yaml") == blocks("README.md", "yaml")


def test_both_readmes_have_the_same_figures():
    rows = [re.findall(r"^\|.*?((?: \d[\d.]* \|){4})$", text(name), re.M) for name in READMES]
    assert rows[0] == rows[1] and len(rows[0]) == 5


def test_the_table_of_stages_has_the_rules_that_there_are():
    rules = re.findall(
        r"^rule (\w+):$", "\n".join(p.read_text() for p in ROOT.glob("rules/*.smk")), re.M
    )
    for name, heading in zip(READMES, ("Where each stage lives", "各阶段在哪里"), strict=True):
        stages = [cell.strip("`") for cell in table(name, heading)]
        assert sorted(stages) == sorted(rules)
        for path in ("rules/{}.smk", "scripts/{}.py", "tests/test_{}.py"):
            assert [s for s in stages if not (ROOT / path.format(s)).exists()] == []


def test_the_order_of_packages_is_the_one_that_is_enforced():
    for name in (*READMES, "CONTRIBUTING.md"):
        listed = re.search(r"`core`[,、]\s*`config`.*?`workflow`", text(name), re.S)[0]
        assert tuple(re.findall(r"`(\w+)`", listed)) == ORDER


def test_the_table_of_dependencies_has_each_of_them():
    """The short lists in envs/ name the dependencies; build.in has only what builds packages."""
    wanted = {"torch"}
    for file in ROOT.glob("envs/*.in"):
        if file.name != "build.in":
            lines = re.findall(r"^[\w-]+(?=$|==|;)", file.read_text(), re.M)
            wanted |= {line for line in lines if not line.startswith("-")}
    for name, heading in zip(READMES, ("Dependencies", "依赖"), strict=True):
        cells = ",".join(re.sub(r"[(（].*", "", cell) for cell in table(name, heading))
        assert sorted(part.strip() for part in re.split("[,、]", cells)) == sorted(wanted)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_its_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)]+)\)", text(name)):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), link
            assert not anchor or anchor in anchors(file), link
