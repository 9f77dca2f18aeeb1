"""The hash of a stage's code follows packages, and refuses what it cannot follow."""

import pytest
from conftest import ROOT

from longyarn.core.code_hash import NOT_HASHED, code_hash, sources

TREE = {
    "stage.py": "from toy.core import numbers\nfrom toy.data.words import count\nimport toy.top\n",
    "toy/__init__.py": '"""A toy."""\n',
    "toy/top.py": "TOP = 1\n",
    "toy/core/__init__.py": '"""The core."""\n',
    "toy/core/numbers.py": "ONE = 1\n",
    "toy/data/__init__.py": '"""The data."""\n',
    "toy/data/words.py": "def count(text):\n    from toy.data import deep\n\n    return deep.length(text)\n",
    "toy/data/deep.py": "def length(text):\n    return len(text)\n",
    "toy/data/unused.py": "TWO = 2\n",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def hashed(tree) -> set[str]:
    return {path.relative_to(tree).as_posix() for path in sources(tree / "stage.py", tree)}


def test_every_imported_module_is_followed_through_packages_and_functions(tree):
    assert hashed(tree) == {
        "stage.py", "toy/top.py", "toy/core/numbers.py", "toy/data/words.py", "toy/data/deep.py",
    }  # fmt: skip


@pytest.mark.parametrize(
    "edited",
    ["stage.py", "toy/top.py", "toy/core/numbers.py", "toy/data/words.py", "toy/data/deep.py"],
)
def test_an_edit_of_any_of_them_changes_the_hash(tree, edited):
    before = code_hash(tree / "stage.py")
    file = tree / edited
    file.write_text(f"{file.read_text()}\nADDED = 1\n")
    assert code_hash(tree / "stage.py") != before


def test_a_module_that_nothing_imports_and_comments_and_docstrings_do_not_count(tree):
    before = code_hash(tree / "stage.py")
    (tree / "toy/data/unused.py").write_text("TWO = 3\n")
    deep = tree / "toy/data/deep.py"
    deep.write_text(f'"""Said."""\n\n# Why.\n{deep.read_text()}')
    (tree / "toy/core/__init__.py").write_text('"""Said in other words."""\n')
    assert code_hash(tree / "stage.py") == before


def test_a_renamed_module_changes_the_hash(tree):
    before = code_hash(tree / "stage.py")
    (tree / "toy/top.py").rename(tree / "toy/peak.py")
    script = tree / "stage.py"
    script.write_text(script.read_text().replace("toy.top", "toy.peak"))
    assert code_hash(script) != before


def test_names_that_belong_to_libraries_are_not_followed(tree):
    script = tree / "stage.py"
    script.write_text(f"import os.path\nfrom json import loads\n{script.read_text()}")
    assert "stage.py" in hashed(tree) and len(hashed(tree)) == 5


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("toy/data/deep.py", "from . import words\n", "relative import"),
        ("toy/data/deep.py", "from ..core import numbers\n", "relative import"),
        ("toy/core/__init__.py", "ONE = 1\n", "has code"),
        ("toy/__init__.py", "import os\n", "has code"),
        ("stage.py", "import toy.core\n", "the package toy.core alone"),
        ("stage.py", "from toy import core\n", "the package toy.core alone"),
        ("stage.py", "from toy.core import *\n", "no module"),
        ("stage.py", "from toy.core import ONE\n", "no module"),
    ],
)
def test_what_cannot_be_followed_is_refused(tree, file, text, reason):
    (tree / file).write_text(text)
    with pytest.raises(ValueError, match=reason):
        code_hash(tree / "stage.py")


def test_all_stages_can_be_followed():
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    assert len({code_hash(script) for script in scripts}) == len(scripts) > 20


def test_only_printing_and_records_are_left_out():
    """Whoever adds a module to this list must be sure that no result depends on it."""
    assert NOT_HASHED == ("longyarn/core/console.py", "longyarn/core/job_record.py")
    for name in NOT_HASHED:
        text = (ROOT / "scripts" / name).read_text()
        for library in ("numpy", "safetensors", "transformers"):
            assert f"import {library}" not in text, name


def test_what_the_hash_of_training_covers():
    """Its numbers come from these packages; what is made of them later must not train again."""
    closure = sources(ROOT / "scripts/train.py", ROOT / "scripts")
    modules = [path.relative_to(ROOT / "scripts") for path in closure if path.name != "train.py"]
    packages = {path.parts[1] for path in modules}
    assert {"core", "models", "data", "training"} <= packages
    assert packages <= {"core", "config", "rope", "models", "data", "training"}
