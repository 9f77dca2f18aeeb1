"""The shape of the code: packages in order, names that say what they are, files of a readable size.

Each rule is a function that yields what breaks it, by file and line. A planted violation shows that it
sees one.
"""

import ast
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from longyarn.stages import BY_NAME

SCRIPTS = ROOT / "scripts"
# A package imports only packages that stand before it, or itself.
ORDER = (
    "core", "config", "rope", "models", "data", "training", "evaluation", "reporting", "provenance",
    "cluster", "workflow",
)  # fmt: skip
# These stand in a row but do not import each other.
APART = ({"data", "evaluation"}, {"training", "reporting", "provenance"})
LINES_OF_A_MODULE, LINES_OF_A_SCRIPT, LINES_OF_A_FUNCTION, MODULES_OF_A_PACKAGE = 300, 220, 60, 12
# Stage names that are also keys of the configuration or of report.json, where they are not stages.
WORDS = {
    "perplexity", "passkey", "harness", "sweep", "merge", "export", "gate", "report", "plan", "train", "pack",
    "push", "provenance", "bundle",
}  # fmt: skip


class Tree:
    """The sources below a directory with ``longyarn`` and stage scripts, parsed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.library = {
            path.relative_to(root).as_posix(): path.read_text()
            for path in sorted(root.joinpath("longyarn").rglob("*.py"))
        }
        self.scripts = {path.name: path.read_text() for path in sorted(root.glob("*.py"))}
        self.trees = {name: ast.parse(text) for name, text in (self.library | self.scripts).items()}

    def modules(self) -> dict[str, ast.Module]:
        """Return the library's modules, without ``__init__``."""
        return {name: self.trees[name] for name in self.library if not name.endswith("__init__.py")}


def package_of(name: str) -> str:
    """Return the package of ``longyarn/core/files.py``; the table of stages stands below all."""
    parts = Path(name).parts
    return parts[1] if len(parts) > 2 else ""


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of every import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def upward(tree: Tree) -> Iterator[str]:
    """A package imports only packages before it in the order."""
    for name, module in tree.modules().items():
        own = package_of(name)
        for line, full in imports(module):
            if not full.startswith("longyarn."):
                continue
            other = full.split(".")[1]
            if other == "stages" or other == own:
                continue
            if not own or ORDER.index(other) > ORDER.index(own):
                yield f"{name}:{line} imports {full}, which stands above it"
            elif any({own, other} <= pair for pair in APART):
                yield f"{name}:{line} imports {full}, and the two packages stay apart"


def unknown_packages(tree: Tree) -> Iterator[str]:
    """Every package has its place in the order, and nothing but the table of stages lies beside them."""
    for name in tree.modules():
        if package_of(name) not in (*ORDER, "") or (
            not package_of(name) and name != "longyarn/stages.py"
        ):
            yield f"{name} is in no known package"


def scripts_in_the_library(tree: Tree) -> Iterator[str]:
    """Nothing in the library imports a stage script or names one by its file."""
    names = {Path(script).stem for script in tree.scripts}
    for name, module in tree.modules().items():
        for line, full in imports(module):
            if full.partition(".")[0] in names:
                yield f"{name}:{line} imports the script {full}"
        for node in ast.walk(module):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and text.endswith(".py") and Path(text).stem in names:
                yield f"{name}:{node.lineno} names the script {text}"


def scripts_in_scripts(tree: Tree) -> Iterator[str]:
    """No script imports another."""
    names = {Path(script).stem for script in tree.scripts}
    for script in tree.scripts:
        for line, full in imports(tree.trees[script]):
            if full.partition(".")[0] in names:
                yield f"{script}:{line} imports {full}"


def relative_imports(tree: Tree) -> Iterator[str]:
    """Every import has the whole name, so that the hash of the code can follow it."""
    for name, module in tree.trees.items():
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{name}:{node.lineno} has a relative import"


def code_in_init(tree: Tree) -> Iterator[str]:
    """An ``__init__.py`` is one docstring of one sentence."""
    for name, text in tree.library.items():
        if not name.endswith("__init__.py"):
            continue
        body = ast.parse(text).body
        if len(body) != 1 or not ast.get_docstring(ast.parse(text)):
            yield f"{name} is more than a docstring"


def stage_names(tree: Tree) -> Iterator[str]:
    """Names of stages are literals in the table of stages alone."""
    names = set(BY_NAME) - WORDS
    for name, module in tree.modules().items():
        if name == "longyarn/stages.py":
            continue
        for node in ast.walk(module):
            if isinstance(node, ast.Constant) and node.value in names:
                yield f"{name}:{node.lineno} has the stage name {node.value!r}"


@functools.cache
def libraries() -> set[str]:
    """Return the names of the standard library's modules and of everything installed."""
    installed = set(importlib.metadata.packages_distributions()) - {"longyarn"}
    return set(sys.stdlib_module_names) | installed | {"statistics", "requests"}


def name_clashes(tree: Tree) -> Iterator[str]:
    """No module, package or script is named like the standard library's or an installed one."""
    for name in (*tree.modules(), *tree.scripts):
        if Path(name).stem in libraries():
            yield f"{name} has the name of a library"
    for package in {package_of(name) for name in tree.modules()} - {""}:
        if package in libraries():
            yield f"longyarn/{package} has the name of a library"


def long_files(tree: Tree) -> Iterator[str]:
    """Modules have at most 300 lines, scripts 220."""
    for texts, most in ((tree.library, LINES_OF_A_MODULE), (tree.scripts, LINES_OF_A_SCRIPT)):
        for name, text in texts.items():
            if (lines := len(text.splitlines())) > most:
                yield f"{name} has {lines} lines, more than {most}"


def long_functions(tree: Tree) -> Iterator[str]:
    """Functions have at most 60 lines."""
    for name, module in tree.trees.items():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > LINES_OF_A_FUNCTION:
                    yield f"{name}:{node.lineno} {node.name} has {lines} lines"


def large_packages(tree: Tree) -> Iterator[str]:
    """Packages have at most 12 modules."""
    counts: dict[str, int] = {}
    for name in tree.modules():
        counts[package_of(name)] = counts.get(package_of(name), 0) + 1
    for package, count in counts.items():
        if count > MODULES_OF_A_PACKAGE:
            yield f"longyarn/{package} has {count} modules"


RULES: dict[Callable, tuple[str, str]] = {
    # Each rule, and a planted violation: a file and its text.
    upward: ("longyarn/core/planted.py", "def f():\n    from longyarn.cluster import estimate\n"),
    unknown_packages: ("longyarn/misc/planted.py", "ONE = 1\n"),
    scripts_in_the_library: ("longyarn/core/planted.py", "def f():\n    import merge\n"),
    scripts_in_scripts: ("planted.py", "def f():\n    from merge import main\n"),
    relative_imports: ("longyarn/core/planted.py", "from . import files\n"),
    code_in_init: ("longyarn/core/__init__.py", '"""Core."""\nONE = 1\n'),
    stage_names: ("longyarn/core/planted.py", "NAME = 'patch_rope'\n"),
    name_clashes: ("longyarn/core/requests.py", "ONE = 1\n"),
    long_files: ("longyarn/core/planted.py", "ONE = 1\n" * 301),
    long_functions: ("longyarn/core/planted.py", "def f():\n" + "    print()\n" * 60),
    large_packages: ("longyarn/core/planted{}.py", "ONE = 1\n"),
}
MORE_PLANTED = [
    (upward, "longyarn/data/planted.py", "import longyarn.evaluation.intervals\n"),
    (upward, "longyarn/reporting/planted.py", "from longyarn.training import guards\n"),
    (upward, "longyarn/evaluation/planted.py", "from longyarn.data import documents\n"),
    (scripts_in_the_library, "longyarn/core/planted.py", "SCRIPT = 'scripts/train.py'\n"),
    (long_files, "planted.py", "ONE = 1\n" * 221),
    (name_clashes, "longyarn/core/statistics.py", "ONE = 1\n"),
    (name_clashes, "tokenizers.py", "ONE = 1\n"),
]


@pytest.fixture(scope="module")
def tree():
    return Tree(SCRIPTS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(tree, rule):
    assert list(rule(tree)) == []


@pytest.mark.parametrize(
    ("rule", "file", "text"),
    [*((rule, *planted) for rule, planted in RULES.items()), *MORE_PLANTED],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_rule_sees_a_planted_violation(tmp_path, rule, file, text):
    (tmp_path / "merge.py").write_text('"""A script."""\n')
    (tmp_path / "train.py").write_text('"""A script."""\n')
    for package in ORDER:
        (tmp_path / "longyarn" / package).mkdir(parents=True)
        (tmp_path / "longyarn" / package / "__init__.py").write_text('"""A package."""\n')
    (tmp_path / "longyarn/__init__.py").write_text('"""A library."""\n')
    (tmp_path / "longyarn/stages.py").write_text("NAME = 'patch_rope'\n")
    assert list(rule(Tree(tmp_path))) == []
    for number in range(13 if "{}" in file else 1):
        place = tmp_path / file.format(number)
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
    assert list(rule(Tree(tmp_path)))


def test_the_words_that_stage_names_share_with_the_configuration():
    """A stage name may be a literal only where it is such a word too."""
    assert set(BY_NAME) >= WORDS
    assert set(BY_NAME) - WORDS == {
        "download_model", "download_corpus", "patch_rope", "tokenise", "export_llamafactory",
        "export_axolotl", "adopt", "checkpoint",
    }  # fmt: skip


def test_every_stage_has_a_row_a_rule_a_script_and_a_test():
    rules = {path.stem for path in (ROOT / "rules").glob("*.smk")} - {"common"}
    assert rules == set(BY_NAME)
    for stage in BY_NAME:
        assert (ROOT / "scripts" / f"{stage}.py").is_file(), stage
        assert (ROOT / "tests" / f"test_{stage}.py").is_file(), stage
        assert f"rule {stage}:" in (ROOT / "rules" / f"{stage}.smk").read_text()


def test_the_schema_names_no_stage_that_the_table_lacks():
    schema = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text())
    assert {"training", "evaluation", "gate"} <= schema["properties"].keys()


LIMITS = {"Snakefile": 100, "rules/common.smk": 130}


def test_rules_are_short():
    for path in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]:
        name = path.relative_to(ROOT).as_posix()
        assert len(path.read_text().splitlines()) <= LIMITS.get(name, 70), name
