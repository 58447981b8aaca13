"""The API's description as a page for people; it needs nothing but itself and a style sheet."""

from __future__ import annotations

from html import escape
from typing import Any

from .openapi import description

METHODS = ("get", "post", "put", "delete")
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>EdgeSight API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/page.css">
<link rel="stylesheet" href="/panels.css">
<script src="/theme.js"></script>
</head>
<body class="api">
<header><a class="brand" href="/" aria-label="EdgeSight, live page">Edge<b>Sight</b></a>
<span class="chip">API</span><a class="button quiet" href="/api/openapi.json">openapi.json</a>
</header>
<main class="text">
"""


def page() -> str:
    """Returns the page."""
    found = description()
    parts = [HEAD, f"<h1>{_text(found['info']['title'])} API</h1>"]
    parts.append(f"<p>{_text(found['info']['description'])}</p>")
    schemas = found["components"]["schemas"]
    ways = found["components"]["securitySchemes"].values()
    parts.append("<h2>Token</h2><ul>")
    for way in ways:
        how = f"cookie {way['name']}" if way["type"] == "apiKey" else "Authorization: Bearer TOKEN"
        parts.append(f"<li><code>{_text(how)}</code> {_text(way['description'])}</li>")
    parts.append("</ul><p>Pages that only this machine can reach ask for none.</p>")
    for tag in found["tags"]:
        parts.append(
            f"<h2>{_text(tag['name'].capitalize())}</h2><p>{_text(tag['description'])}</p>"
        )
        for path, item in found["paths"].items():
            for method in METHODS:
                if tag["name"] in item.get(method, {}).get("tags", ()):
                    parts.append(_operation(method, path, item))
    parts.append("<h2>Shapes</h2>")
    parts += [_schema(name, schema) for name, schema in schemas.items()]
    return "\n".join([*parts, "</main></body></html>\n"])


def _operation(method: str, path: str, item: dict[str, Any]) -> str:
    operation = item[method]
    lines = [f'<details class="card operation"><summary><b class="method {method}">']
    lines.append(f"{method.upper()}</b> <code>{_text(path)}</code> ")
    lines.append(f"<span>{_text(operation['summary'])}</span></summary>")
    given = [*item.get("parameters", ()), *operation.get("parameters", ())]
    if given:
        lines.append("<h3>Takes</h3><ul>")
        for one in given:
            where = f"{one['in']}, {_kind(one['schema'])}"
            lines.append(f"<li><code>{_text(one['name'])}</code> <small>{where}</small> ")
            lines.append(f"{_text(one.get('description', ''))}</li>")
        lines.append("</ul>")
    if "requestBody" in operation:
        lines.append(f"<h3>Body</h3><p>{_contents(operation['requestBody'])}</p>")
    lines.append("<h3>Answers</h3><table><tbody>")
    for status, answer in operation["responses"].items():
        lines.append(f"<tr><th scope=row>{status}</th><td>{_text(answer['description'])}</td>")
        lines.append(f"<td>{_contents(answer)}</td></tr>")
    lines.append("</tbody></table></details>")
    return "".join(lines)


def _contents(holder: dict[str, Any]) -> str:
    return "<br>".join(
        f"<code>{_text(kind)}</code> {_kind(media.get('schema', {}))}"
        for kind, media in holder.get("content", {}).items()
    )


def _schema(name: str, schema: dict[str, Any]) -> str:
    needed = schema.get("required", ())
    rows = "".join(
        f"<tr><th scope=row><code>{_text(key)}</code></th><td>{_kind(inner)}"
        f"{'' if key in needed else ', may be absent'}</td>"
        f"<td>{_text(inner.get('description', ''))}</td></tr>"
        for key, inner in schema["properties"].items()
    )
    return (
        f'<section class="card" id="{_text(name)}"><h3>{_text(name)}</h3>'
        f"<p>{_text(schema['description'])}</p><table><tbody>{rows}</tbody></table></section>"
    )


def _kind(schema: dict[str, Any]) -> str:
    """Returns what a value is, in a few words with links."""
    if "$ref" in schema:
        name = _text(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    kinds = schema.get("type", "")
    if "properties" in schema:
        return "object: " + ", ".join(f"<code>{_text(key)}</code>" for key in schema["properties"])
    text = " or ".join(kinds) if isinstance(kinds, list) else _text(kinds)
    if "items" in schema:
        text += f" of {_kind(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        text += f" of {_kind(schema['additionalProperties'])}"
    if "minimum" in schema and "maximum" in schema:
        text += f", {schema['minimum']}..{schema['maximum']}"
    return text


def _text(text: str) -> str:
    return escape(text.replace("`", ""), quote=True)
