"""No line is lost to what stands in it."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from app.logging import _json


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("one\ntwo", "one\ntwo"),
        (2**80, 2**80),
        ("half \ud800", "half \ud800"),
        ({1: "a key that is no string"}, {"1": "a key that is no string"}),
        (Decimal("0.1"), "0.1"),
    ],
    ids=["newline", "large integer", "surrogate", "key", "decimal"],
)
def test_every_value_stands_on_one_line_of_json(value: object, shown: object) -> None:
    line = _json({"event": value}, str)
    assert "\n" not in line
    assert json.loads(line) == {"event": shown}
