"""Rows whose text means something to a page that reads it as more than text."""

from __future__ import annotations

import csv
import io

HOSTILE = {
    "html": '<img src=x onerror="alert(1)"><script>alert(2)</script><b>bold</b> &amp; </td></tr></table>',
    "markdown": "**bold** _u_ `code` [link](https://a.example) ![image](https://a.example/p.png)\n\n# head\n\n- item",
    "quotes": """a "quoted" 'mug' | with | pipes | and \\ slashes {{ 7 * 7 }} ${7}""",
    "emoji": "👨‍👩‍👧 and 🦊 in 🇩🇪 snow",
    "right-to-left": "قطة نائمة على حصيرة \u202eabc\u202c חתול",
    '<i id="row">|*x*': "an id that is no better",
}
"""By their ids."""


def as_table(prompts: dict[str, str], first_seed: int) -> bytes:
    """A prompt table as CSV, with seeds from the first one on."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["id", "prompt", "seed", "aspect_ratio"])
    table.writerows(
        [row_id, prompt, seed, "1:1"] for seed, (row_id, prompt) in enumerate(prompts.items(), start=first_seed)
    )
    return text.getvalue().encode()


def shown(text: str) -> str:
    """A text as a page shows it: with single spaces, and without the places where long words may break."""
    return " ".join(text.replace("\u200b", "").split())
