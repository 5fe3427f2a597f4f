"""A TCP proxy between a process and its store: it delays, swallows, resets or slices what passes, or loses messages."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final, Literal

Mode = Literal["pass", "latency", "blackhole", "reset", "sliced", "deaf"]

LATENCY_SECONDS: Final = 0.2
SLICE_BYTES: Final = 5
READ_BYTES: Final = 65_536
MESSAGES: Final = re.compile(rb"[*>]3\r\n\$7\r\nmessage\r\n\$\d+\r\n[^\r]*\r\n\$\d+\r\n[^\r]*\r\n")
"""What a subscriber of Redis is pushed, in either protocol. One is short enough to come in one piece."""

RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER for no time at all: closing sends RST instead of FIN."""


class Proxy:
    """Listens on a loopback port in front of a unix socket. ``mode`` may change at any moment."""

    def __init__(self, upstream: str) -> None:
        self.mode: Mode = "pass"
        self.port = 0
        self._upstream = upstream
        self._writers: set[asyncio.StreamWriter] = set()

    def become(self, mode: Mode) -> None:
        """Change what happens to the bytes; ``reset`` ends every connection there is, and each that comes."""
        self.mode = mode
        if mode == "reset":
            for writer in list(self._writers):
                _reset(writer)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection, both ways."""
        if self.mode == "reset":
            _reset(writer)
            return
        try:
            store_reader, store_writer = await asyncio.open_unix_connection(self._upstream)
        except OSError:
            _reset(writer)
            return
        self._writers |= {writer, store_writer}
        await asyncio.gather(self._carry(reader, store_writer), self._carry(store_reader, writer))
        for one in (writer, store_writer):
            self._writers.discard(one)
            one.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(READ_BYTES):
                match self.mode:
                    case "blackhole":
                        # Swallowed for good: what follows on this connection would make no sense, so nothing does.
                        await _for_ever(reader)
                        break
                    case "latency":
                        await asyncio.sleep(LATENCY_SECONDS)
                        writer.write(data)
                    case "sliced":
                        for first in range(0, len(data), SLICE_BYTES):
                            writer.write(data[first : first + SLICE_BYTES])
                            await writer.drain()
                            await asyncio.sleep(0)
                    case "deaf":
                        writer.write(MESSAGES.sub(b"", data))
                    case _:
                        writer.write(data)
                await writer.drain()
        with suppress(OSError):
            writer.close()


async def _for_ever(reader: asyncio.StreamReader) -> None:
    """Read and drop until the other side gives up."""
    while await reader.read(READ_BYTES):
        pass


def _reset(writer: asyncio.StreamWriter) -> None:
    opened = writer.get_extra_info("socket")
    with suppress(OSError):
        if opened is not None and opened.family == socket.AF_INET:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    writer.transport.abort()


@asynccontextmanager
async def open_proxy(upstream: str) -> AsyncIterator[Proxy]:
    """A proxy in front of the unix socket ``upstream``."""
    proxy = Proxy(upstream)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.become("reset")
