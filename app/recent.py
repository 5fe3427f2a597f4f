"""The accounts changed last, and the marks this process read last: a guess that a commit proves or refuses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from app.contracts import Contract
from app.records import RecordError, parse_account
from app.services.trading import Account, Market
from app.shared_accounts import AccountTexts, SharedAccounts

ACCOUNTS_MAX: Final = 10_000
"""About a kilobyte each."""


@dataclass(slots=True)
class Basis:
    """What a decision is made on, and the texts that a commit compares with what is there.

    A ``guessed`` one was not read for this decision: its commit also compares ``epoch``, the mark version, the texts
    of the marks, and that nothing is halted.
    """

    account: Account
    market: Market
    balance_text: bytes
    fields: tuple[bytes, ...]
    seq_text: bytes
    breach_text: bytes
    has_slot: bool
    epoch: bytes = b""
    mark_texts: Mapping[str, bytes] | None = None

    @property
    def guessed(self) -> bool:
        """Whether the marks and the epoch are compared as well."""
        return self.mark_texts is not None


@dataclass(slots=True)
class KnownAccount:
    """An account as a commit left it."""

    account: Account
    texts: AccountTexts


class Recent:
    """What one process may guess. Whoever takes an account's guess has it alone, so no two commits bet on one.

    Where an API has several workers, only what they share is guessed: whichever of them changed an account last, the
    others know it. What this process remembers then saves it parsing what it wrote itself.
    """

    def __init__(self, contracts: Mapping[str, Contract], shared: SharedAccounts | None = None) -> None:
        self._contracts = contracts
        self._shared = shared
        self._accounts: OrderedDict[str, KnownAccount] = OrderedDict()
        self._market: Market | None = None
        self._mark_texts: Mapping[str, bytes] = {}
        self._marked: set[str] = set()

    def keep_market(self, market: Market, mark_texts: Mapping[str, bytes]) -> None:
        """Remember the marks of a read, unless newer ones are known; halted ones are no ground for a guess."""
        if market.halted:
            self._market = None
        elif self._market is None or market.mark_version >= self._market.mark_version:
            self._market, self._mark_texts = market, mark_texts
            self._marked = {symbol for symbol, text in mark_texts.items() if text}

    def forget_market(self) -> None:
        """A guess was wrong: the marks are those of the next read, even if their version is older."""
        self._market = None

    def keep(self, known: KnownAccount) -> None:
        """Remember an account that has just been committed and is in no breach."""
        self._accounts[known.account.account_id] = known
        if len(self._accounts) > ACCOUNTS_MAX:
            self._accounts.popitem(last=False)
        if self._shared is not None:
            self._shared.keep(known.texts)

    def take(self, account_id: str) -> Basis | None:
        """The guess on an account, once."""
        known = self._accounts.pop(account_id, None)
        if self._shared is not None:
            known = self._newest(known, self._shared.take(account_id))
        if known is None or self._market is None:
            return None
        if not known.account.positions.keys() <= self._marked:
            return None  # a mark that is missing cannot be compared: it may be set by hand meanwhile
        texts = known.texts
        return Basis(
            account=known.account,
            market=self._market,
            balance_text=texts.balance_text,
            fields=texts.fields,
            seq_text=texts.seq_text,
            breach_text=b"",
            has_slot=True,
            epoch=texts.epoch,
            mark_texts=self._mark_texts,
        )

    def _newest(self, known: KnownAccount | None, shared: AccountTexts | None) -> KnownAccount | None:
        """The account as the workers share it; what this process knows of it, where that is the same."""
        if shared is None:
            return None
        if known is not None and known.texts == shared:
            return known
        try:
            account = parse_account(shared.account_id, shared.balance_text, shared.fields, self._contracts)
        except RecordError:
            return None  # two workers wrote at once
        return KnownAccount(account, shared)
