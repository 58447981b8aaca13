"""What all HTML pages of reports share: how a template becomes one, with nothing from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..models.errors import MissingExtraError


def render_page(template: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """Returns an HTML page; what is put into it is escaped.

    Args:
        template: Name of the jinja file, which lies beside this one.
        filters: Name in the template -> function that turns a value into text.
        values: What the template asks for; leaving out one that it uses is an error.

    Raises:
        MissingExtraError: There is no jinja2.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError.of(package="jinja2") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(filters)
    text = (Path(__file__).parent / template).read_text("utf-8")
    return environment.from_string(text).render(**values)
