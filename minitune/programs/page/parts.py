"""Parts that a page is put together of: figures and tables, as HTML."""

import json
from collections.abc import Iterable
from html import escape

from minitune.programs.page.curves import Figure


def drawn(figure: Figure) -> str:
    """Place of a figure, which DRAW fills once the page is there."""
    content = escape(json.dumps(figure._asdict(), allow_nan=False))
    return f'<div class="plot" data-figure="{content}"></div>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Table with a row of titles."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{titles}</tr>{lines}</table></div>'
