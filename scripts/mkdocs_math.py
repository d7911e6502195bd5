"""A hook of mkdocs, named in mkdocs.yml: TeX becomes MathML in the build, so a page needs no script and no network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)


def on_page_content(content: str, **kwargs: Any) -> str:
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    tag, formula = match.groups()
    math = convert(html.unescape(formula).strip(), display="block" if tag == "div" else "inline")
    # MathML knows no named functions: without a space, exp f reads as one word.
    math = re.sub(r"(<mi>(?:log|exp|det)</mi>)(?!<mo[^>]*>&#x00028;)", r'\1<mspace width="0.17em"/>', math)
    return f"<{tag}>{math}</{tag}>"
