"""What mkdocs needs to show our docstrings: they carry Sphinx's math and roles, and doctests, and it reads Markdown.

Named in mkdocs.yml as an extension of griffe, which reads the source.
"""

import re
from typing import Any

import griffe


def to_markdown(text: str) -> str:
    """Rewrite math, roles and doctests of a docstring as Markdown."""
    text = re.sub(r"^( *)\.\. math::\s*\n?((?:.+\n?)+)", _display_math, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", text)
    text = re.sub(r":\w+:`~?(energyreg[\w.]*\.)(\w+)`", r"[`\2`][\1\2]", text)
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"^( *)>>> (?:.+\n?)+", _fence, text, flags=re.MULTILINE)


def _display_math(match: re.Match[str]) -> str:
    indent, formula = match.groups()
    return f"{indent}\\[{' '.join(formula.split())}\\]\n"


def _fence(match: re.Match[str]) -> str:
    indent, code = match[1], match[0].rstrip("\n")
    return f"{indent}```pycon\n{code}\n{indent}```\n"


class DocstringsToMarkdown(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
