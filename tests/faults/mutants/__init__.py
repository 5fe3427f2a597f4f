"""One-line mutations of the product, and the row each of them has to turn red."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Mutant:
    """``old`` becomes ``new`` in ``file``; the tests that ``rows`` selects (``pytest -k``) must fail."""

    row: str
    rows: str
    file: str
    old: str
    new: str
    says: str
    tests: str = "tests/faults"


SIMULATION: Final = "tests/property/test_simulation.py"
LOST_COLUMNS: Final = "tests/integration/test_lost_columns.py"
"""Where no watchdog mends the column first."""
KEPT_COLUMNS: Final = "tests/integration/test_kept_columns.py"

MUTANTS: Final = (
    Mutant(
        "F1",
        "test_f01",
        "app/scripts/commit.lua",
        "  if ARGV[first + 5] ~= '' then\n    redis.call('SET', KEYS[key],",
        "  if false then\n    redis.call('SET', KEYS[key],",
        "operation ids are not remembered: a retry books again",
    ),
    Mutant(
        "F2",
        "test_f02 and committed",
        "app/outbox.py",
        "                if await self.drain(older_than_seconds",
        "                if False and await self.drain(older_than_seconds",
        "nobody drains what a dead process left behind",
    ),
    Mutant(
        "F2",
        "test_f02 and committed",
        "app/history.py",
        '"ON CONFLICT DO NOTHING RETURNING id"',
        '"RETURNING id"',
        "a row that is there already is an error",
    ),
    Mutant(
        "F4",
        "test_f03 and full_outbox",
        "app/outbox.py",
        "        self.postgres_away = True",
        "        self.postgres_away = False",
        "the breaker never opens: each answer waits for a Postgres that is silent",
    ),
    Mutant(
        "F6",
        "test_f06 and killed",
        "app/redis_client.py",
        "            if not script.writes:",
        "            if True:",
        "a commit that may have been applied is called not sent",
    ),
    Mutant(
        "F7",
        "test_f06 and power",
        "app/scripts/guard.lua",
        "if known ~= run_id then return {'state_unreconciled'} end",
        "if false then return {'state_unreconciled'} end",
        "a Redis that lost its last writes is written to at once",
    ),
    Mutant(
        "F7",
        "test_f06 and power",
        "app/history.py",
        "(SELECT fenced_epoch()) = $2::bigint",
        "$2::bigint > 0",
        "rows of an older epoch are not fenced",
    ),
    Mutant(
        "F7",
        "test_f06 and power",
        "app/reconcile.py",
        "        if last_id < recorded:",
        "        if False:",
        "what Redis lost is not rolled forward",
    ),
    Mutant(
        "F9",
        "test_f09",
        "app/redis_client.py",
        "            if not script.writes:",
        "            if True:",
        "a commit without an answer is called not sent",
    ),
    Mutant(
        "F11",
        "test_f11",
        "app/batcher.py",
        "        if confirmed < self.replicas:",
        "        if False:",
        "an answer does not wait for a replica",
    ),
    Mutant(
        "F12",
        "test_f12",
        "app/scripts/guard.lua",
        "if not integer_of(epoch[1]) then return {'state_missing'} end",
        "if not epoch[1] then epoch = {'1', 'ready', signature} end",
        "an empty Redis is taken for a state",
    ),
    Mutant(
        "F12",
        "test_f12",
        "app/rebuild.py",
        "pipeline.set(keys.HISTORY_LAST_ID, newest_id)",
        "pipeline.set(keys.HISTORY_LAST_ID, 0)",
        "a rebuilt state gives its ids again",
    ),
    Mutant(
        "F17",
        "test_f17 and two_and_three",
        "app/scripts/breach.lua",
        "if (ledger[3] or '') ~= breach_judged(i) then return 'settled' end",
        "if breach_judged(i) ~= '' and (ledger[3] or '') ~= breach_judged(i) then return 'settled' end",
        "whoever comes second opens the breach again",
    ),
    Mutant(
        "F17",
        "test_f17 and wakes",
        "app/scripts/breach.lua",
        "if last_version > version then return 'stale' end",
        "if false then return 'stale' end",
        "an old verdict is recorded after the recovery",
    ),
    Mutant(
        "F21",
        "test_f21 and account",
        "app/scripts/guard.lua",
        "if type(answer) == 'table' and answer.err then return nil, {'wrong_type', key} end",
        "if false then return nil, {'wrong_type', key} end",
        "types are not checked before anything is touched",
    ),
    Mutant(
        "F21",
        "trade_writes_into_a_lost",
        "app/scripts/guard.lua",
        "if bytes < slots * 8 then return {'columns_short', key} end",
        "if false then return {'columns_short', key} end",
        "a row is written into a column that was lost: the others read as zeros",
        LOST_COLUMNS,
    ),
    Mutant(
        "F21",
        "edit_by_hand_beside",
        "app/booking.py",
        "before = snapshot.known_account()",
        "before = snapshot.packed_account()",
        "an edit by hand starts from what a damaged column says",
        LOST_COLUMNS,
    ),
    Mutant(
        "sim",
        "nothing_is_lost",
        "app/scripts/commit.lua",
        "    and (balance or '') == ARGV[first + 6] and #held == 2 * count\n"
        "  local values = {}\n"
        "  for i = 1, #held, 2 do values[held[i]] = held[i + 1] end\n"
        "  for i = 1, count do "
        "unchanged = unchanged and values[ARGV[fields + 2 * i - 1]] == ARGV[fields + 2 * i] end\n",
        "\n",
        "a commit does not compare the record",
        SIMULATION,
    ),
    Mutant(
        "sim",
        "nothing_is_lost",
        "app/history.py",
        "(SELECT fenced_epoch()) = $2::bigint",
        "$2::bigint > 0",
        "rows of an older epoch are not fenced",
        SIMULATION,
    ),
    Mutant(
        "kept",
        "only_what_changed",
        "app/scripts/commit.lua",
        "note_changes(KEYS[11], noted, table.concat(changed))",
        "",
        "a commit does not note its slot",
        KEPT_COLUMNS,
    ),
    Mutant(
        "kept",
        "breaches_are_read",
        "app/scripts/breach.lua",
        "  note_changes(KEYS[9], noted, table.concat(changed))",
        "",
        "a breach does not note its slot",
        KEPT_COLUMNS,
    ),
)
