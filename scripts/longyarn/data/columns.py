"""Turning a record of a data set or a file into a document: text, or messages of an instruction set."""

import re

ROLES = ("system", "user", "assistant")


class BadRecord(Exception):
    """A record that gives no document. The message continues a sentence about it: "… is not JSON"."""


def to_document(record: object, entry: dict, name: str) -> dict:
    """Return the document of a record, from the columns that an entry of the config names.

    ``name`` is the document's name if the entry has no id_column. Null counts as empty text. Raise
    ``BadRecord`` if a column is missing or has another type.
    """
    if not isinstance(record, dict):
        raise BadRecord("is not an object with columns")
    if entry["id_column"]:
        name = str(value_at(record, entry["id_column"]))
    document = {"id": f"{entry['collection']}/{name}"}
    if entry["messages_column"]:
        document["messages"] = messages(value_at(record, entry["messages_column"]))
    elif entry["instruction_column"]:
        asked = text_at(record, entry["instruction_column"])
        if entry["input_column"]:
            asked = "\n\n".join(filter(None, [asked, text_at(record, entry["input_column"])]))
        document["messages"] = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": text_at(record, entry["answer_column"])},
        ]
    else:
        document["text"] = text_at(record, entry["column"])
    check_unicode(document)
    return document


def columns(entry: dict) -> list[str]:
    """Return the columns that an entry of the config uses."""
    if entry["messages_column"]:
        wanted = ["messages_column", "id_column"]
    elif entry["instruction_column"]:
        wanted = ["instruction_column", "input_column", "answer_column", "id_column"]
    else:
        wanted = ["column", "id_column"]
    return [entry[key] for key in wanted if entry[key]]


def value_at(record: dict, path: str) -> object:
    """Return a column's value; the path ``meta.name`` is the key ``name`` in the column ``meta``."""
    if path in record:
        return record[path]
    value: object = record
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise BadRecord(
                f"has no column {path!r}; it has {', '.join(map(repr, record)) or 'none'}"
            )
        value = value[part]
    return value


def text_at(record: dict, path: str) -> str:
    """Return a column's text."""
    return text_of(value_at(record, path), path)


def text_of(value: object, what: str) -> str:
    """Return a value that must be text, or empty text for None; ``what`` names it in an error."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(f"has {kind(value)} in {what!r} instead of text")
    return value


def messages(value: object) -> list[dict]:
    """Return a conversation as ``[{"role", "content"}, …]``."""
    if not isinstance(value, list):
        raise BadRecord(f"has {kind(value)} as its messages instead of a list")
    found = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadRecord("has a message without role and content")
        if message["role"] not in ROLES:
            raise BadRecord(
                f"has a message with the role {message['role']!r}, not one of {', '.join(ROLES)}"
            )
        content = text_of(message["content"], "content")
        found.append({"role": message["role"], "content": content})
    return found


def kind(value: object) -> str:
    """Describe a value's type in words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "other data")


def check_unicode(document: dict) -> None:
    """Raise ``BadRecord`` for half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        for text in [document["id"], *texts(document)]:
            text.encode()
    except UnicodeEncodeError:
        raise BadRecord("has half of a surrogate pair, which is not a character") from None


def texts(document: dict) -> list[str]:
    """Return the texts of a document: its own, or those of its messages."""
    if "text" in document:
        return [document["text"]]
    return [message["content"] for message in document["messages"]]


def characters(document: dict) -> int:
    """Return the number of characters of a document's text or of its messages."""
    return sum(map(len, texts(document)))


def is_empty(document: dict) -> bool:
    """Tell whether a document has only whitespace, or a conversation has no answer."""
    if "text" in document:
        return not document["text"].strip()
    return not any(m["role"] == "assistant" and m["content"].strip() for m in document["messages"])


def identifier(name: str) -> str:
    """Return a name in lower case, with an underscore for each run of other characters."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def clean(text: str) -> str:
    """Return text with Unix line ends and without the end-of-file mark of old systems (0x1A)."""
    return text.replace("\r\n", "\n").replace("\x1a", "").strip() + "\n"
