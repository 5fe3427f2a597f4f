"""What a client knows of each operation it sent: ok, refused or unknown. And the result row of one fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

ACKNOWLEDGED_MIN: Final = 100

Outcome = Literal["pending", "ok", "refused", "unknown"]
Kind = Literal["trade", "deposit", "withdrawal"]
PATHS: Final = {"deposit": "deposit", "withdrawal": "withdraw"}


@dataclass(slots=True, eq=False)
class Operation:
    """One operation of one client id; ``answers`` holds the history ids that answers have named."""

    client_id: str
    kind: Kind
    account_id: str
    body: dict[str, Any]
    sent_at: float = 0.0
    answered_at: float = 0.0
    slowest_seconds: float = 0.0
    outcome: Outcome = "pending"
    history_ids: set[int] = field(default_factory=set)
    status: int = 0
    code: str = ""
    recorded: bool = False

    @property
    def id_field(self) -> str:
        """The name of the client id in bodies and queries."""
        return "client_trade_id" if self.kind == "trade" else "client_transfer_id"

    @property
    def path(self) -> str:
        """Where it is posted."""
        return "/trade" if self.kind == "trade" else f"/accounts/{self.account_id}/{PATHS[self.kind]}"

    @property
    def listing(self) -> str:
        """Where its row is listed."""
        return "/trades" if self.kind == "trade" else "/transfers"


@dataclass(slots=True)
class Row:
    """What one fault did over all its rounds."""

    fault: str
    what: str
    rounds: int = 0
    operations: int = 0
    acknowledged: int = 0
    in_flight: int = 0
    lost: int = 0
    doubled: int = 0
    unknown_left: int = 0
    recovery_seconds: float = 0.0
    took_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def recovered(self, seconds: float) -> None:
        """Keep the worst recovery."""
        self.recovery_seconds = max(self.recovery_seconds, seconds)

    def complain(self, problem: str) -> None:
        """Make the row red."""
        self.problems.append(problem)

    def reasons(self) -> list[str]:
        """Why the row is red; nothing when it is green."""
        counted = {"lost": self.lost, "doubled": self.doubled, "left unknown": self.unknown_left}
        found = [f"{count} {name}" for name, count in counted.items() if count]
        if self.acknowledged < ACKNOWLEDGED_MIN:
            found.append(f"only {self.acknowledged} acknowledged operations: it proves nothing")
        if not self.in_flight:
            found.append("nothing was in flight at the fault: it proves nothing")
        return found + self.problems

    def require_green(self) -> None:
        """Fail with every reason."""
        reasons = self.reasons()
        assert not reasons, f"{self.fault} is red:\n" + "\n".join(reason[:300] for reason in reasons[:12])


HEADINGS: Final = (
    "fault",
    "what",
    "rounds",
    "operations",
    "acknowledged",
    "in flight",
    "lost",
    "doubled",
    "unknown left",
    "worst recovery",
    "took",
    "",
)


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table, its columns aligned."""
    cells = [
        (
            row.fault,
            row.what,
            *(
                f"{number:,}"
                for number in (
                    row.rounds,
                    row.operations,
                    row.acknowledged,
                    row.in_flight,
                    row.lost,
                    row.doubled,
                    row.unknown_left,
                )
            ),
            f"{row.recovery_seconds:.2f} s",
            f"{row.took_seconds:.0f} s",
            "red" if row.reasons() else "green",
        )
        for row in sorted(rows, key=lambda row: int("".join(filter(str.isdigit, row.fault.split()[0])) or 0))
    ]
    widths = [max(len(line[column]) for line in [HEADINGS, *cells]) for column in range(len(HEADINGS))]
    rule = tuple("-" * max(3, width) for width in widths)
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        for line in (HEADINGS, rule, *cells)
    )
