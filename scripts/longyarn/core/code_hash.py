"""The hash of a stage's code: what its script and our own modules that it imports do."""

import ast
import functools
import hashlib
from pathlib import Path


def code_hash(script: Path) -> str:
    """Return a hash of what a script does: its syntax tree and those of the modules it imports.

    Comments, docstrings and layout do not count, so that improving them never retrains a model.
    Only our own modules count (those that lie beside the script); libraries have versions.
    """
    root = Path(script).resolve().parent
    digest = hashlib.sha256()
    for path, syntax in sorted(_local_sources(Path(script).resolve(), root).items()):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(syntax.encode())
    return digest.hexdigest()[:16]


def _local_sources(script: Path, root: Path) -> dict[Path, str]:
    """Return what the script and, transitively, the modules under ``root`` that it imports say."""
    found: dict[Path, str] = {}
    pending = [script]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found[path], names = _syntax(path.read_text(encoding="utf-8"), str(path))
        candidates = (root / (name.replace(".", "/") + ".py") for name in names)
        pending.extend(candidate for candidate in candidates if candidate.is_file())
    return found


@functools.cache  # Snakemake's start hashes each rule's code, and most modules are of many rules
def _syntax(text: str, path: str) -> tuple[str, list[str]]:
    """Return a source's syntax tree without docstrings, as text, and the names that it imports."""
    tree = ast.parse(text, filename=path)
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            body[0] = ast.Pass()
    return ast.dump(tree), names


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
