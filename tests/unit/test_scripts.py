"""The Lua scripts, read as text: keys come in KEYS, money is never computed with, checks come before writes."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from app import redis_client
from app.redis_client import Script

FOLDER = resources.files("app") / "scripts"
SCRIPTS = {
    path.name.removesuffix(".lua"): "\n".join(
        re.sub(r"--.*", "", line) for line in path.read_text(encoding="utf-8").splitlines()
    )
    for path in FOLDER.iterdir()
    if path.name.endswith(".lua")
}
"""The sources by name, without their comments."""

PARTS = {"guard", "snapshot"}
"""What is put before other scripts, and is none by itself."""

WITHOUT_KEY = {"INFO", "TIME", "PUBLISH"}

UNGUARDED = {"put_aside"}
"""It changes no account and adds no row, and what it mends has to be mended in any state."""

READS = {
    "EXISTS",
    "GET",
    "GETRANGE",
    "HGET",
    "HGETALL",
    "HLEN",
    "HMGET",
    "LINDEX",
    "LLEN",
    "LRANGE",
    "MGET",
    "STRLEN",
    "TYPE",
    "XLEN",
    "XRANGE",
    *WITHOUT_KEY,
}
WRITES = {
    "DEL",
    "EXPIRE",
    "HDEL",
    "HSET",
    "INCR",
    "INCRBY",
    "MSET",
    "RENAME",
    "RPUSH",
    "SET",
    "SETRANGE",
    "XADD",
    "XDEL",
}

KEY_PARAMETERS = r"(?:\w+_)?key"
"""What a local function calls the key it is handed."""

OUT_OF_KEYS = rf"KEYS\[[^\]]+\]|unpack\(KEYS, [^()]+\)|{KEY_PARAMETERS}"
"""What stands for a key, or for some that stand side by side."""

CALLS = r"(?:redis\.call|\bread)\('(\w+)'(?:,\s*((?:[^(),]|\((?:[^()]|\([^()]*\))*\))+))?"


def calls(source: str) -> list[tuple[str, str]]:
    """Every command with its first argument."""
    return [(command, first.strip()) for command, first in re.findall(CALLS, source)]


def test_the_scripts_are_those_that_redis_client_names() -> None:
    named = {item.name for item in vars(redis_client).values() if isinstance(item, Script)}
    assert named == set(SCRIPTS) - PARTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_key_a_script_touches_comes_in_keys(name: str) -> None:
    found = calls(SCRIPTS[name])
    assert len(found) == len(re.findall(r"redis\.call\(|\bread\('", SCRIPTS[name]))
    for command, first in found:
        if command not in WITHOUT_KEY:
            assert re.fullmatch(OUT_OF_KEYS, first), f"{name}: {command} {first}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_local_function_is_handed_its_keys_out_of_keys(name: str) -> None:
    """A parameter called ``..._key`` or ``key`` is one: whoever calls the function passes an element of KEYS."""
    defined = {
        function: [parameter.strip() for parameter in parameters.split(",")]
        for source in {*(SCRIPTS[part] for part in PARTS), SCRIPTS[name]}
        for function, parameters in re.findall(r"local function (\w+)\(([^)]*)\)", source)
    }
    for function, parameters in defined.items():
        for arguments in re.findall(rf"(?<!function )\b{function}\(([^()]*(?:\([^()]*\)[^()]*)*)\)", SCRIPTS[name]):
            passed = [argument.strip() for argument in re.split(r",(?![^\[]*\])", arguments)]
            for parameter, argument in zip(parameters, passed, strict=False):
                if re.fullmatch(KEY_PARAMETERS, parameter):
                    assert re.fullmatch(rf"KEYS\[[^\]]+\]|{KEY_PARAMETERS}", argument), (
                        f"{name}: {function}({argument})"
                    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_is_known_to_read_or_to_write(name: str) -> None:
    assert {command for command, _ in calls(SCRIPTS[name])} <= READS | WRITES


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - PARTS))
def test_a_script_that_writes_asks_the_guard_first(name: str) -> None:
    source = SCRIPTS[name]
    written = [found.start() for found in re.finditer(rf"redis\.call\('(?:{'|'.join(WRITES)})'", source)]
    script = getattr(redis_client, name.upper())
    assert script.writes is bool(written or "append_history(" in source)
    if name in UNGUARDED:
        return
    refusal = source.index("refusal(KEYS[1], KEYS[2], ARGV[1])")
    assert all(refusal < position for position in written)


@pytest.mark.parametrize("name", ["breach", "columns", "commit", "mark", "put_aside", "repack", "swept"])
def test_nothing_is_refused_any_more_once_a_script_has_begun_to_write(name: str) -> None:
    """Scripts do not roll back, so no refusal may follow the first write."""
    source = SCRIPTS[name]
    first_write = min(
        found.start() for found in re.finditer(rf"redis\.call\('(?:{'|'.join(WRITES)})'|append_history\(", source)
    )
    answers = re.findall(r"(?:return|outcomes\[at\] =) \{'([a-z_]+)'", source[first_write:])
    assert set(answers) == {"ok"}
    for read in ("wrong_type(", "next_history_id(", "read("):
        assert read not in source[first_write:]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_counter_that_cannot_be_read_is_not_taken_for_none(name: str) -> None:
    """``read`` answers nil and a refusal then; who takes the nil alone would write, and fail in the middle."""
    assert not re.search(r"\bread\([^()]*\) or '0'", SCRIPTS[name])


NUMBERS_THAT_ARE_NO_MONEY = {
    "breach": {"2", "4"},  # mark version, number of positions
    "changed_rows": {"2", "3", "4"},  # change known, number of changes, number of symbols
    "columns": {"2"},  # number of accounts
    # number of symbols, outbox limit, numbers of arguments, of symbols touched and of fields, number of a symbol
    "commit": {"3", "first + 4", "first", "first + 16", "fields", "i"},
    "refresh": {"2", "i"},  # number of columns, slot
    "swept": {"2"},  # version
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_a_number_of_an_amount(name: str) -> None:
    converted = set(re.findall(r"(?:tonumber|integer_of)\(ARGV\[([^\]]+)\]\)", SCRIPTS[name]))
    assert converted <= NUMBERS_THAT_ARE_NO_MONEY.get(name, set())


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_does_arithmetic_on_what_it_is_given(name: str) -> None:
    """Lua would take a text for a number without being asked."""
    source = SCRIPTS[name]
    assert not re.search(r"ARGV\[[^\]]*\]\s*(?:[-+*/%^]|<|>)", source)
    assert not re.search(r"(?:[-+*/%^<>])\s*ARGV\[", source)
    assert not re.search(r"redis\.call\('\w*GET\w*'[^)]*\)\s*[-+*/%^]", source)
    assert "BYFLOAT" not in source


def test_commands_that_add_are_used_on_counters_only() -> None:
    """Keys 7 and 8 of a breach and 8 of a commit count breaches, those after ``first_open`` the open accounts."""
    added = {(name, command, first) for name in SCRIPTS for command, first in calls(SCRIPTS[name]) if "INCR" in command}
    assert added == {
        ("breach", "INCRBY", "KEYS[7]"),
        ("breach", "INCRBY", "KEYS[8]"),
        ("commit", "INCR", "KEYS[8]"),
        ("commit", "INCRBY", "KEYS[first_open + number]"),
    }


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - PARTS))
def test_a_script_that_writes_a_row_notes_its_slot(name: str) -> None:
    """Sweeps read only what is noted. ``columns`` puts whole columns in place and forgets the notes."""
    source = SCRIPTS[name]
    notes = "note_changes(" in source
    assert notes is ("'SETRANGE'" in source)
    if name == "columns":
        assert "forget_changes(KEYS[4])" in source


def test_the_source_that_redis_gets_starts_with_the_guard() -> None:
    assert redis_client.COMMIT.text.startswith((FOLDER / "guard.lua").read_text(encoding="utf-8"))
    assert len(redis_client.COMMIT.sha) == 40
    assert len({script.sha for script in vars(redis_client).values() if isinstance(script, Script)}) == len(
        SCRIPTS
    ) - len(PARTS)
