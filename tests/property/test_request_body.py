"""Whatever bytes a body is, it is read as JSON says, or refused as a 4xx; nothing else happens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import HTTPException
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from app.json_body import ExactJSONRequest, NumberText
from app.schemas import HaltRequest, MarkRequest, TradeRequest, TransferRequest
from tests.property.repeatable import repeatable

ECHOED_BYTES_MAX = 128
MODELS: tuple[type[BaseModel], ...] = (TradeRequest, MarkRequest, TransferRequest, HaltRequest)
NAMES = sorted({name for model in MODELS for name in model.model_fields})

texts = st.text(st.characters(codec=None), max_size=20)
numbers = st.one_of(
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.from_regex(r"-?(0|[1-9][0-9]{0,59})(\.[0-9]{1,60})?([eE][+-]?[0-9]{1,400})?", fullmatch=True),
    st.sampled_from(["NaN", "Infinity", "-Infinity", "-0", "1e400", "0." + "0" * 5_000 + "1", "9" * 5_000]),
)


def written(value: Any) -> str:  # noqa: ANN401 - any JSON
    """``value`` as JSON, numbers as the texts they are, objects with all of their pairs."""
    if isinstance(value, NumberText):
        return str(value)
    if isinstance(value, tuple):
        return "{" + ", ".join(f"{json.dumps(name)}: {written(item)}" for name, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(written(item) for item in value) + "]"
    return json.dumps(value)


values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(numbers.map(NumberText), st.booleans(), st.none(), texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(st.tuples(st.one_of(st.sampled_from(NAMES), texts), inner), max_size=6).map(tuple),
    ),
    max_leaves=12,
)
objects = st.lists(st.tuples(st.one_of(st.sampled_from(NAMES), texts), values), max_size=8).map(tuple)


def read(body: bytes) -> tuple[int, Any]:
    """200 and ``body`` as a route reads it, or the status and the words of the refusal."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        return 200, asyncio.run(ExactJSONRequest({"type": "http", "headers": []}, receive).json())
    except HTTPException as refusal:
        return refusal.status_code, str(refusal.detail)


def plain(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """The pairs of ``value`` as dictionaries, as a reader gives them."""
    if isinstance(value, tuple):
        return {name: plain(item) for name, item in value}
    return [plain(item) for item in value] if isinstance(value, list) else value


def names_a_member_twice(value: Any) -> bool:  # noqa: ANN401 - any JSON
    if isinstance(value, tuple):
        names = [name for name, _ in value]
        return len(set(names)) < len(names) or any(names_a_member_twice(item) for _, item in value)
    return isinstance(value, list) and any(names_a_member_twice(item) for item in value)


@repeatable
@given(value=values)
def test_json_is_read_as_it_is_written_and_a_doubled_name_refused(value: Any) -> None:  # noqa: ANN401 - any JSON
    status, content = read(written(value).encode())
    if names_a_member_twice(value):
        assert status == 422
    else:
        assert (status, content) == (200, plain(value))


@repeatable
@given(body=st.one_of(st.binary(max_size=200), st.text(st.sampled_from('{}[]",:\\ue1.-+ 0aNtrl\x00\ud800'))).map(
    lambda text: text if isinstance(text, bytes) else text.encode(errors="surrogatepass")))  # fmt: skip
@example(body=b"[" * 60_000)
@example(body=b'{"a":' * 12_000)
@example(body=b"\xef\xbb\xbf{}")
@example(body=b'{"a": "\xed\xa0\x80"}')
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    status, content = read(body)
    assert status in {200, 400, 422}
    assert status == 200 or len(content.encode()) <= 2 * ECHOED_BYTES_MAX


@repeatable
@given(body=objects, model=st.sampled_from(MODELS))
def test_a_body_that_was_read_makes_a_request_or_is_refused_by_name(
    body: tuple[Any, ...], model: type[BaseModel]
) -> None:
    status, content = read(written(body).encode())
    assert status in {200, 422}
    if status == 422:
        return
    try:
        request = model.model_validate(content)
    except ValidationError:
        return
    for value in request.model_dump().values():
        assert not isinstance(value, str) or value.isprintable()
