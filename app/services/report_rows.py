"""The accounts of the margin report as JSON, thousands at once, to the last digit as Decimal would show them.

A row that does not fit, and any that needs a second thought, is not ``plain`` and left to Decimal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from app.columns import Chunk
from app.contracts import Contract
from app.numbers import DECIMAL_PLACES
from app.services.exact_rows import (
    Part,
    Texts,
    Units,
    emptied,
    exact_margins,
    fitting_rows,
    number_texts,
    ratio,
    shown_in,
    side_by_side,
)
from app.services.margin import Flags

NAME_CHARACTERS: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"
NAME_LENGTH_MAX: Final = 64
_STATES: Final = (
    b'ok","candidate":false',
    b'candidate","candidate":true',
    b'recovering","candidate":false',
    b'negative_equity","candidate":false',
)
_NULL: Final = np.frombuffer(b"null", dtype=np.uint32)[0]


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """One JSON object a plain row, in records of one length, with gaps; each object comes after a comma."""

    plain: Flags
    _records: bytearray

    def text(self, first: int, end: int) -> bytearray:
        """The objects of rows ``first`` to ``end``, all of them plain, each after a comma."""
        length = len(self._records) // len(self.plain)
        whole = (first, end) == (0, len(self.plain))  # then a copy is spared
        records = self._records if whole else self._records[first * length : end * length]
        return records.translate(None, b"\0")


def encode_rows(chunk: Chunk, names: Sequence[bytes], *, contracts: Mapping[str, Contract]) -> EncodedRows:
    """The accounts in the rows of ``chunk``, called ``names``, valued at its marks."""
    longest = len(max(names, key=len, default=b""))
    fits = fitting_rows(chunk, contracts) & _named(names, longest) & (chunk.breach >= 0)
    if not fits.all():
        # What does not fit is not shown, and must not make the records of all others longer.
        chunk, names = emptied(chunk, ~fits), [name if fit else b"" for name, fit in zip(names, fits, strict=True)]
    valued = exact_margins(chunk, contracts)
    equity, used, maintenance, places = valued.equity, valued.used_margin, valued.maintenance_margin, valued.places
    in_breach, is_open = chunk.breach != 0, valued.notional != 0
    state = np.where(valued.candidate, 1, np.where(in_breach, 2, np.where(~is_open & (chunk.balance < 0), 3, 0)))
    utilisation, utilisation_fits = ratio(used, equity)
    margin_ratio, ratio_fits = ratio(maintenance, equity)
    without_ratio = is_open & (equity <= 0)
    parts: list[Part] = [
        *(b',{"account_id":"', np.array(names, f"S{max(1, min(longest, NAME_LENGTH_MAX))}")),
        *(b'","state":"', np.array(_STATES[: state.max(initial=0) + 1])[state]),
        *(b',"balance":"', *number_texts(chunk.balance, DECIMAL_PLACES)),
        *(b'","equity":"', *number_texts(equity, places)),
        *(b'","used_margin":"', *number_texts(used, places)),
        *(b'","maintenance_margin":"', *number_texts(maintenance, places)),
        *(b'","free_margin":"', *number_texts(equity - used, places)),
        *(b'","margin_utilisation":', *_or_null(_quoted(utilisation), without_ratio)),
        *(b',"margin_ratio":', *_or_null(_quoted(margin_ratio), without_ratio)),
        *(b',"open_breach_id":', *_or_null(number_texts(chunk.breach, 0), ~in_breach), b"}"),
    ]
    return EncodedRows(fits & (without_ratio | (utilisation_fits & ratio_fits)), side_by_side(len(chunk), parts))


def _named(names: Sequence[bytes], longest: int) -> Flags:
    """Which names can stand in JSON as they are."""
    if longest <= NAME_LENGTH_MAX and not b"".join(names).translate(None, NAME_CHARACTERS):
        return np.ones(len(names), dtype=np.bool_)
    return np.array(
        [len(name) <= NAME_LENGTH_MAX and not name.translate(None, NAME_CHARACTERS) for name in names], dtype=np.bool_
    )


def _quoted(units: Units) -> list[Texts]:
    return [b'"', *number_texts(units, DECIMAL_PLACES), b'"']


def _or_null(parts: Sequence[Texts], null: Flags) -> list[Texts]:
    """``parts``, but ``null`` in those rows."""
    if not null.any():
        return list(parts)
    if null.all():
        return [b"null"]
    shown = ~null
    return [null * _NULL, *(shown_in(part, shown) if isinstance(part, bytes) else part * shown for part in parts)]
