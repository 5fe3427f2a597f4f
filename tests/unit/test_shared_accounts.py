"""What the workers of one API share of accounts: the newest of each, once, and nothing that is half there."""

from __future__ import annotations

import zlib
from itertools import count
from pathlib import Path
from typing import Final

import pytest

from app.shared_accounts import ACCOUNTS_MAX, ENTRY_BYTES, FILE_NAME, LENGTH_BYTES, AccountTexts, SharedAccounts

ALICE: Final = AccountTexts("alice", b"1", b"7", b"100.5", (b"BTC-PERP", b'{"quantity": "1", "cost": "50000"}'))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    SharedAccounts.create(tmp_path)
    return tmp_path


@pytest.mark.parametrize("texts", [ALICE, ALICE._replace(fields=()), ALICE._replace(fields=(b"A", b"1", b"B", b"2"))])
def test_what_one_worker_keeps_another_takes_once(directory: Path, texts: AccountTexts) -> None:
    here, there = SharedAccounts(directory), SharedAccounts(directory)
    here.keep(texts)
    assert there.take("alice") == texts
    assert (here.take("alice"), there.take("alice")) == (None, None)


def test_the_newest_stays(directory: Path) -> None:
    shared = SharedAccounts(directory)
    shared.keep(ALICE)
    shared.keep(ALICE._replace(seq_text=b"8", fields=()))
    assert shared.take("alice") == ALICE._replace(seq_text=b"8", fields=())


def test_an_account_is_never_taken_for_another_in_its_place(directory: Path) -> None:
    place = zlib.crc32(b"alice") % ACCOUNTS_MAX
    other = next(name for n in count() if zlib.crc32((name := f"bob-{n}").encode()) % ACCOUNTS_MAX == place)
    shared = SharedAccounts(directory)
    shared.keep(ALICE)
    assert shared.take(other) is None
    assert shared.take("alice") == ALICE
    shared.keep(ALICE._replace(account_id=other))
    assert shared.take("alice") is None
    assert shared.take(other) == ALICE._replace(account_id=other)


@pytest.mark.parametrize(("spare", "is_kept"), [(1, True), (0, True), (-1, False)])
def test_an_account_that_does_not_fit_is_not_shared_nor_what_it_was(
    directory: Path, spare: int, *, is_kept: bool
) -> None:
    neighbours = [SharedAccounts(directory) for _ in range(2)]
    texts = ALICE._replace(fields=())
    taken = LENGTH_BYTES + len(b"alice" + b"1" + b"7") + 3
    texts = texts._replace(balance_text=b"1" * (ENTRY_BYTES - taken - spare))
    neighbours[0].keep(ALICE)
    neighbours[0].keep(texts)
    assert neighbours[1].take("alice") == (texts if is_kept else None)


@pytest.mark.parametrize("length", [0, 1, 5, 6, 9, 10, 11, 12, 65_535])
def test_a_length_that_is_not_the_entry_s_does_no_harm(directory: Path, length: int) -> None:
    shared = SharedAccounts(directory)
    shared.keep(ALICE)
    at = zlib.crc32(b"alice") % ACCOUNTS_MAX * ENTRY_BYTES
    with (directory / FILE_NAME).open("r+b") as file:
        file.seek(at)
        file.write(length.to_bytes(LENGTH_BYTES, "little"))
    found = shared.take("alice")
    assert found is None or found.account_id == "alice"


def test_the_space_is_taken_when_the_table_is_made(directory: Path) -> None:
    assert (directory / FILE_NAME).stat().st_blocks * 512 >= ACCOUNTS_MAX * ENTRY_BYTES


def test_only_workers_whose_api_made_a_table_find_one(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
    assert SharedAccounts.found() is not None
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory / "elsewhere"))
    assert SharedAccounts.found() is None
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    monkeypatch.chdir(directory)
    assert SharedAccounts.found() is None
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")
    assert SharedAccounts.found() is None
