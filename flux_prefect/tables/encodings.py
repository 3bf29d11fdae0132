"""The encoding of text tables: UTF-8, UTF-16, or Windows-1252 where its rule holds."""

from __future__ import annotations

import codecs
import re

from flux_prefect.errors import TableError
from flux_prefect.tables.sources import Source

__all__ = ["find_encoding"]

_PIECE = 1024 * 1024
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MARKS = "\u2018\u2019“”„\u201a\u2013—…•€£§©®°·«»¡¿\u00a0"
_LETTERS = "ÄÖÜäöüßÀÂÆÇÉÈÊËÎÏÔŒÙÛàâæçéèêëîïôœùûÁÍÑÓÚáíñóúÃÕãõÅØåø"
_WESTERN = frozenset(_LETTERS + _MARKS)
_WRONG = re.compile(
    f"[{_LETTERS}]{{3}}"  # as Cyrillic and Greek words read in Windows-1252
    f"|[a-zß-ÿ][{_LETTERS[:3]}ÀÂÆÇÉÈÊËÎÏÔŒÙÛÁÍÑÓÚÃÕÅØ]"  # a capital within a word
    "|[^\\W\\d_][„“”…•€£§©®°·«»¡¿\u201a\u2018][^\\W\\d_]"  # a mark within a word, as in DOS code pages
)


def find_encoding(source: Source) -> str:
    """Find the encoding of a text table. Reads it once unless it has a byte order mark.

    A byte order mark decides. Without one: UTF-16 if one of the first two bytes is NUL, else UTF-8 if the whole file
    is, else Windows-1252 if the file reads as text of Western Europe in it: only its letters and marks, no
    three accented letters in a row, no capital or mark within a word.

    Raises:
        TableError: none of these. The message has the first line that is not UTF-8.
    """
    with source.open() as file:
        start = file.read(4)
    for mark, encoding in _BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return encoding
    if len(start) >= 2 and start[:2].count(0) == 1:  # noqa: PLR2004 - one character
        return "utf-16-be" if start[0] == 0 else "utf-16-le"
    line = _first_line_beside_utf8(source)
    if line is None:
        return "utf-8"
    if _is_western(source):
        return "cp1252"
    raise TableError(
        f"{source.name}, line {line}: it is not UTF-8 text, nor surely Windows-1252: save it as UTF-8 "
        "(in Excel: CSV UTF-8)."
    )


def _first_line_beside_utf8(source: Source) -> int | None:
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with source.open() as file:
        while piece := file.read(_PIECE):
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                return line + error.object.count(b"\n", 0, error.start)
            line += piece.count(b"\n")
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return line
    return None


def _is_western(source: Source) -> bool:
    rest = ""
    with source.open() as file:
        while piece := file.read(_PIECE):
            try:
                text = rest + piece.decode("cp1252")
            except UnicodeDecodeError:
                return False
            if "\0" in text or any(letter not in _WESTERN for letter in {*text} if letter > "\x7f"):
                return False
            if _WRONG.search(text):
                return False
            rest = text[-2:]
    return True
