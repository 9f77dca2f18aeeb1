"""Checks of config section `corpus`, and the names of its collections."""

import difflib

from longyarn.core.errors import UserError


def check_corpus(corpus: dict) -> None:
    """Refuse a corpus without a source or without held-out documents, and what contradicts itself."""
    entries = corpus["files"] + corpus["datasets"]
    sources = collections(corpus)
    if not sources:
        raise UserError("corpus is empty; state corpus.packages, corpus.files or corpus.datasets")
    names = set(sources)
    for entry in entries:
        if sources.count(entry["collection"]) > 1:
            raise UserError(
                f"two sources of corpus have the collection {entry['collection']!r}; give one another name"
            )
        asked, answered = entry["instruction_column"], entry["answer_column"]
        if bool(asked) != bool(answered) or (entry["input_column"] and not asked):
            raise UserError(
                f"collection {entry['collection']!r} of corpus has part of an instruction set; state "
                "instruction_column and answer_column, or neither"
            )
        if entry["messages_column"] and asked:
            raise UserError(
                f"collection {entry['collection']!r} of corpus states messages_column and "
                "instruction_column; leave one null"
            )
    for name in corpus["held_out"]:
        if name.partition("/")[0] not in names:
            raise UserError(
                f"corpus.held_out names {name!r}, but no source has the collection "
                f"{name.partition('/')[0]!r}; fix it, or set corpus.held_out to [] for none"
            )
    counts = corpus["held_out_documents"]
    for unknown in sorted(counts.keys() - names):
        raise UserError(
            f"corpus.held_out_documents names the collection {unknown!r}, which no source has; the "
            f"corpus has {near(unknown, names)}, and null takes a name out that another file put in"
        )


def collections(corpus: dict) -> list[str]:
    """Return the collection of each source of a corpus; a package names one as often as it likes."""
    packages = [rule["collection"] for source in corpus["packages"] for rule in source["documents"]]
    return [
        *dict.fromkeys(packages),
        *(entry["collection"] for entry in corpus["files"] + corpus["datasets"]),
    ]


def near(name: str, known: set[str]) -> str:
    """Return the known name that is most like another, or the first few."""
    return ", ".join(difflib.get_close_matches(name, known, n=1) or sorted(known)[:3])
