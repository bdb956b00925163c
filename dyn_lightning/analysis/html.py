"""Pages that open without a network: pictures are inside of them."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

STYLE = """
body { font-family: system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
figure { margin: 2rem 0; } img { max-width: 100%; border: 1px solid #ddd; }
figcaption { max-width: 50rem; line-height: 1.4; margin-bottom: .5rem; }
div { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:nth-child(2):last-child { text-align: left; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; }
"""


def document(title: str, *body: str) -> str:
    """Make a page; the parts of its body are HTML."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n{''.join(body)}\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a table; the first cell of a row is its name."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"] if head else []
    for first, *cells in rows:
        lines.append(
            f"<tr><th>{html.escape(first)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        )
    return f"<div><table>{''.join(lines)}</table></div>\n"


def picture(name: str, path: Path, text: str) -> str:
    """Make a figure of a PNG file."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<figure><h2>{html.escape(name)}</h2><figcaption>{html.escape(text)}</figcaption>"
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></figure>\n'
    )
