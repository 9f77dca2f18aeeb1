"""Writing conversations as text with a chat template, and finding the answers in it.

Base models have no template of their own, so the configuration names one. Answers are what the template
puts between ``{% generation %}`` and ``{% endgeneration %}``, which are transformers' tags.
"""

import re
from pathlib import Path

from longyarn.core.errors import UserError, first_line
from longyarn.core.files import ROOT

NAMED = ROOT / "resources" / "chat"


def path_of(name: str) -> Path:
    """Return the file of a template: one in resources/chat by its name, or any other by its path."""
    named = NAMED / f"{name}.jinja"
    return named if named.is_file() else Path(name).expanduser()


def load(name: str) -> str:
    """Return a template's text; raise ``UserError`` if there is none or it marks no answers."""
    path = path_of(name)
    known = ", ".join(sorted(file.stem for file in NAMED.glob("*.jinja")))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"corpus.chat_template {name!r} is neither {known} nor a text file; name one of them"
        ) from None
    if not re.search(r"\{%-?\s*generation\s*-?%\}", text):
        raise UserError(
            f"the template {path} marks no answers; put {{% generation %}} and {{% endgeneration %}} "
            "around what the assistant writes"
        )
    return text


def render(
    template: str, messages: list[dict], special: dict[str, str]
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation's text, and the first and the end character of each answer in it.

    ``special`` has the template's ``bos_token`` and ``eos_token``.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, answers = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **special
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise UserError(
            f"corpus.chat_template does not fit a conversation ({first_line(error)}); correct the "
            "template or the data"
        ) from None
    return texts[0], answers[0]
