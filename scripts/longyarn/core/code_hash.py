"""The hash of a stage's code: its script and our own modules that the script imports."""

import ast
import functools
import hashlib
from pathlib import Path

# These modules only print, or keep records that no result depends on. Rewording a line of progress must not
# retrain a model, so they do not count. tests/test_code_hash.py guards this list.
NOT_HASHED = ("longyarn/core/console.py", "longyarn/core/job_record.py")


def code_hash(script: Path) -> str:
    """Return a hash of what a script does: its syntax tree and the trees of the modules it imports.

    Comments, docstrings, and layout do not count, so improving them never retrains a model. Only our own
    modules count, which lie below the script's directory; libraries have versions instead. Imports inside
    functions count too. Raises ``ValueError`` for an import that cannot be followed.
    """
    script = Path(script).resolve()
    root = script.parent
    digest = hashlib.sha256()
    for path, syntax in sorted(sources(script, root).items()):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(syntax.encode())
    return digest.hexdigest()[:16]


def sources(script: Path, root: Path) -> dict[Path, str]:
    """Return the script and every module below ``root`` that it imports, directly or through others.

    Each path maps to its syntax tree as text, without docstrings.
    """
    found: dict[Path, str] = {}
    pending = [script]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found[path], imports = _parse(path.read_text(encoding="utf-8"), str(path))
        for module, names in imports:
            pending += _files(root, module, names, path)
    return found


def _files(root: Path, module: str, names: tuple[str, ...], path: Path) -> list[Path]:
    """Return the files below ``root`` that one import statement of ``path`` reads."""
    place = root.joinpath(*module.split("."))
    if place.is_dir() and (place / "__init__.py").is_file():
        _require_docstring_only(place / "__init__.py")
        if not names:
            raise ValueError(
                f"{path} imports the package {module} alone; import its modules by name"
            )
        modules = [f"{module}.{name}" for name in names]
    else:
        modules = [module]
    found = []
    for name in modules:
        inner = root.joinpath(*name.split("."))
        if inner.is_dir() and (inner / "__init__.py").is_file():
            raise ValueError(f"{path} imports the package {name} alone; import its modules by name")
        file = inner.with_suffix(".py")
        if file.is_file():
            _require_packages_above(file, root)
            if file.relative_to(root).as_posix() not in NOT_HASHED:
                found.append(file)
        elif modules != [module]:
            raise ValueError(f"{path} imports {name}, which is no module; import modules by name")
    return found


def _require_packages_above(file: Path, root: Path) -> None:
    """Check the ``__init__.py`` of each package that importing a module runs first."""
    for directory in file.parents:
        if directory == root:
            return
        _require_docstring_only(directory / "__init__.py")


@functools.cache
def _require_docstring_only(file: Path) -> None:
    """Refuse code in an ``__init__.py``: it would run, and no hash would show its changes."""
    body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
    if not all(_is_docstring(node) for node in body):
        raise ValueError(f"{file} has code; move it into a module")


@functools.cache  # Snakemake hashes the code of each rule when it starts, and rules share most modules
def _parse(text: str, path: str) -> tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]:
    """Return a source's syntax tree as text, without docstrings, and its imports: (module, names)."""
    tree = ast.parse(text, filename=path)
    imports: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(
                    f"{path} has a relative import; write the whole name of the module"
                )
            imports.append((node.module, tuple(alias.name for alias in node.names)))
        elif isinstance(node, ast.Import):
            imports += [(alias.name, ()) for alias in node.names]
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            body[:1] = [] if len(body) > 1 else [ast.Pass()]
    return ast.dump(tree), tuple(imports)


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
