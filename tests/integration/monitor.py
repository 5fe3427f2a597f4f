"""Every command that Redis runs while a test looks, those inside of scripts too, with what Redis says it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio

from tests.integration.desk import command

END = "PING the-monitor-may-stop"


@dataclass
class Seen:
    """The commands of one watch, in order, as lists of words, and Redis' own description of each."""

    commands: list[list[str]] = field(default_factory=list)
    flags: dict[str, set[str]] = field(default_factory=dict)

    def flagged(self, flag: str) -> list[list[str]]:
        """The commands with a flag: ``write``, ``readonly``, ``pubsub``."""
        return [command for command in self.commands if flag in self.flags.get(command[0].lower(), set())]

    def words(self) -> set[str]:
        """Every word of every command."""
        return {word for command in self.commands for word in command}


@asynccontextmanager
async def monitored(redis_url: str) -> AsyncIterator[Seen]:
    """Watch what this Redis runs; all is there when the block has ended."""
    seen = Seen()
    async with (
        redis.asyncio.Redis.from_url(redis_url, decode_responses=True) as client,
        redis.asyncio.Redis.from_url(redis_url, decode_responses=True) as watching,
        watching.monitor() as monitor,
    ):
        described: dict[str, Any] = await client.command()
        seen.flags = {name: set(what["flags"]) for name, what in described.items()}

        async def listen() -> None:
            async for entry in monitor.listen():
                if entry["command"] == END:
                    return
                seen.commands.append(entry["command"].split(" "))

        listening = asyncio.create_task(listen())
        yield seen
        await command(client, *END.split())
        await asyncio.wait_for(listening, timeout=10)
