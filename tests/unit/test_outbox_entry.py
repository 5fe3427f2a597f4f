"""What of the stream outbox is a row of history, and what is put aside."""

from __future__ import annotations

from typing import Final

import pytest

from app.history import HistoryEntry
from app.outbox import entry_from_stream

ROW: Final = HistoryEntry(5, "trade", "alice", 7, 1, 1_795_876_224_939_641, b'{"price":"1"}')
VALUE: Final = b'alice\n7\n1\n1795876224939641\n{"price":"1"}'
LAYOUT_3: Final = {
    b"kind": b"trade",
    b"account": b"alice",
    b"seq": b"7",
    b"epoch": b"1",
    b"time": b"1795876224939641",
    b"body": b'{"price":"1"}',
}


@pytest.mark.parametrize("fields", [{b"trade": VALUE}, LAYOUT_3], ids=["now", "as layout 3 wrote it"])
def test_a_row_that_waits_is_read(fields: dict[bytes, bytes]) -> None:
    assert entry_from_stream(b"5-0", fields) == ROW


@pytest.mark.parametrize(
    ("entry_id", "fields"),
    [
        (b"5-1", {b"trade": VALUE}),
        (b"5-0", {b"what": b"no script wrote"}),
        (b"5-0", {b"what": VALUE}),
        (b"5-0", {b"trade": VALUE, b"transfer": VALUE}),
        (b"5-0", {b"trade": VALUE.replace(b"7", b"seven", 1)}),
        (b"5-0", {b"trade": VALUE.replace(b"1795876224939641", b"9" * 20)}),
        (b"5-0", {b"trade": VALUE.replace(b"\n7\n", b"\n" + b"9" * 20 + b"\n")}),
        (b"5-0", {b"trade": VALUE.replace(b"price", b"\xff")}),
        (b"5-0", {b"trade": VALUE.replace(b"alice", b"\xff")}),
        (b"5-0", {b"kind": b"trade"}),
        (b"5-0", {**LAYOUT_3, b"kind": b"what"}),
    ],
    ids=str,
)
def test_what_no_script_wrote_is_no_row(entry_id: bytes, fields: dict[bytes, bytes]) -> None:
    with pytest.raises((KeyError, ValueError)):
        entry_from_stream(entry_id, fields)
