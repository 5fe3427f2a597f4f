"""Accounts as the workers of one API left them last: a table in memory that all of them map."""

from __future__ import annotations

import mmap
import os
import zlib
from pathlib import Path
from typing import Final, NamedTuple, Self

ACCOUNTS_MAX: Final = 32_768
ENTRY_BYTES: Final = 512
"""An account with one position takes some 200; one that takes more than these is not shared."""

LENGTH_BYTES: Final = 2
FILE_NAME: Final = "accounts"
_SEPARATOR: Final = b"\0"


class AccountTexts(NamedTuple):
    """What a commit left of an account, as Redis holds it, and the epoch of that commit."""

    account_id: str
    epoch: bytes
    seq_text: bytes
    balance_text: bytes
    fields: tuple[bytes, ...]


class SharedAccounts:
    """One place an account, by the hash of its id; of those that meet in a place the newest stays.

    Nothing is locked. What is found is a guess, and a commit compares every text of a guess with what is there: an
    entry that is stale, or that two workers wrote at once, is a wrong guess and never a wrong trade.
    """

    def __init__(self, directory: Path) -> None:
        with (directory / FILE_NAME).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), ACCOUNTS_MAX * ENTRY_BYTES)

    @classmethod
    def create(cls, directory: Path) -> None:
        """Make an empty table, its space taken now: a disk that is full later would kill whoever writes."""
        with (directory / FILE_NAME).open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, ACCOUNTS_MAX * ENTRY_BYTES)

    @classmethod
    def found(cls) -> Self | None:
        """The table that ``plimsoll api`` made for its workers, if it has several."""
        directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        return cls(Path(directory)) if directory and Path(directory, FILE_NAME).exists() else None

    def keep(self, texts: AccountTexts) -> None:
        """Note an account that has just been committed."""
        account_id = texts.account_id.encode()
        entry = _SEPARATOR.join((account_id, texts.epoch, texts.seq_text, texts.balance_text, *texts.fields))
        if len(entry) > ENTRY_BYTES - LENGTH_BYTES:
            entry = b""
        at = _place(account_id)
        self._memory[at : at + LENGTH_BYTES + len(entry)] = len(entry).to_bytes(LENGTH_BYTES, "little") + entry

    def take(self, account_id: str) -> AccountTexts | None:
        """What was noted of an account, once: whoever changes it notes what comes of that."""
        encoded = account_id.encode()
        at = _place(encoded)
        begin = at + LENGTH_BYTES
        end = begin + int.from_bytes(self._memory[at:begin], "little")
        found, *texts = self._memory[begin:end].split(_SEPARATOR)
        if found != encoded or len(texts) % 2 == 0 or len(texts) == 1:
            return None
        self._memory[at:begin] = bytes(LENGTH_BYTES)
        epoch, seq_text, balance_text, *fields = texts
        return AccountTexts(account_id, epoch, seq_text, balance_text, tuple(fields))


def _place(account_id: bytes) -> int:
    return zlib.crc32(account_id) % ACCOUNTS_MAX * ENTRY_BYTES
