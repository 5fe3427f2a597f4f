"""What keeps a process from starting or a command from running, in words for whoever can mend it."""

from __future__ import annotations

import sys

import httpx
import psycopg2
import redis
import structlog
from pydantic import ValidationError
from pydantic_settings import SettingsError
from sqlalchemy.exc import OperationalError, ProgrammingError
from starlette.types import Message, Send

from app.errors import PlimsollError
from app.security import KeylessError
from app.server_process import EmbeddedServerError

log = structlog.get_logger(__name__)


def reason_of(error: BaseException | None) -> str | None:
    """The words for a user's mistake or an absent server; None for anything else, which is our mistake."""
    match error:
        case ValidationError():
            return "\n".join(
                f"PLIMSOLL_{'_'.join(str(part) for part in item['loc']).upper()}: {item['msg']}"
                for item in error.errors()
            )
        case OperationalError() | psycopg2.OperationalError():
            return f"Postgres: {' '.join(str(getattr(error, 'orig', None) or error).split())}"
        case ProgrammingError() if isinstance(error.orig, psycopg2.errors.InsufficientPrivilege):
            said = str(error.orig).partition("\n")[0]
            return f"Postgres: {said}; PLIMSOLL_MIGRATIONS_URL names the role that owns the tables"
        case redis.ConnectionError() | redis.TimeoutError():
            return f"Redis: {error}"
        case httpx.TransportError():
            return f"the API does not answer: {error}"
        case EmbeddedServerError() | KeylessError() | PlimsollError() | SettingsError():
            return str(error)
        case _:
            return None


def say_refusal(error: BaseException) -> bool:
    """Log in one line why this process does not start; False, and nothing, for a mistake of ours."""
    reason = reason_of(error)
    if reason is None:
        return False
    log.critical("the process does not start", reason=reason, code=getattr(error, "code", "invalid_setting"))
    return True


def without_traceback(send: Send) -> Send:
    """The ``send`` of an application's lifespan; a start that was refused is one line instead of a traceback."""

    async def send_reason(message: Message) -> None:
        # It is sent while the error is handled, and its message is nothing but the traceback.
        error = sys.exception() if message["type"] == "lifespan.startup.failed" else None
        if error is not None and say_refusal(error):
            message = {"type": message["type"]}
        await send(message)

    return send_reason
