"""Which accounts somebody may see and touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from app import errors

WILDCARD: Final = "*"
"""Ends a prefix; alone it is every account. No account's name holds one."""


@dataclass(frozen=True, slots=True)
class Reach:
    """The accounts with one of these ``names``, or whose name begins with one of the ``prefixes``."""

    names: frozenset[str]
    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, patterns: Sequence[str]) -> Reach:
        """Account ids, and prefixes that end in ``*``."""
        return cls(
            names=frozenset(item for item in patterns if not item.endswith(WILDCARD)),
            prefixes=tuple(item.removesuffix(WILDCARD) for item in patterns if item.endswith(WILDCARD)),
        )

    @property
    def is_whole(self) -> bool:
        """Whether it is every account."""
        return "" in self.prefixes

    def includes(self, account_id: str) -> bool:
        """Whether the account, which may exist or not, is one of these."""
        return account_id in self.names or account_id.startswith(self.prefixes)

    def require(self, account_id: str) -> None:
        """Raise ``UnknownAccount`` for any other account, in the words for one that does not exist."""
        if not self.includes(account_id):
            raise errors.unknown_account(account_id)


EVERY_ACCOUNT: Final = Reach.of([WILDCARD])
