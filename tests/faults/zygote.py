"""Starts API and watchdog processes fast: it has imported the product once, and each of them is a fork of it.

It reads one JSON request a line from its standard input and answers each with one line. A process it started is as
real as any: a session, sockets and a log of its own, and it dies of SIGKILL like any other.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]


class Zygote:
    """The client's side: start, kill and look after processes by their ids."""

    def __init__(self, log_path: Path, environment: Mapping[str, str]) -> None:
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.zygote"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**environment, "OPENBLAS_NUM_THREADS": "1"},
                text=True,
                start_new_session=True,
            )
        self._children: set[int] = set()

    def start(self, kind: str, port: int, log: Path, variables: Mapping[str, str]) -> int:
        """Fork an ``api`` or a ``watchdog``; its process id."""
        pid = self._ask(do="start", kind=kind, port=port, log=str(log), variables=dict(variables))
        self._children.add(pid)
        return pid

    def kill(self, pid: int) -> None:
        """SIGKILL, and wait until the process is gone."""
        self._ask(do="kill", pid=pid)
        self._children.discard(pid)

    def is_running(self, pid: int) -> bool:
        """Whether the process has not exited."""
        return pid in self._children and bool(self._ask(do="look", pid=pid))

    def close(self) -> None:
        """Kill what is left, then end."""
        if self._process.poll() is None:
            for pid in sorted(self._children):
                self.kill(pid)
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(5)

    def _ask(self, **request: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def serve() -> None:
    """Answer requests until the standard input ends."""
    import uvicorn  # noqa: F401, PLC0415

    import app.main  # noqa: F401, PLC0415
    import watchdog.__main__  # noqa: F401, PLC0415

    gc.freeze()
    exited: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        pid = int(request.get("pid", 0))
        answer = 0
        match request["do"]:
            case "start":
                answer = _fork(request)
            case "kill":
                if pid not in exited:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                exited.discard(pid)
            case _:
                if pid not in exited and os.waitpid(pid, os.WNOHANG)[0] == pid:
                    exited.add(pid)
                answer = int(pid not in exited)
        print(answer, flush=True)  # noqa: T201


def _fork(request: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(request["variables"])
        _become(request["kind"], int(request["port"]))
    finally:
        os._exit(1)


def _become(kind: str, port: int) -> None:
    import uvicorn  # noqa: PLC0415

    import watchdog.__main__  # noqa: PLC0415
    from app import failpoints  # noqa: PLC0415
    from app.config import get_settings  # noqa: PLC0415

    failpoints.configure(os.environ.get(failpoints.VARIABLE, ""))
    get_settings.cache_clear()
    if kind == "watchdog":
        watchdog.__main__.main()
        return
    # As `plimsoll api` calls it, for one worker.
    uvicorn.run(
        "app.main:app",
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="app.http_protocol:BoundedHttpProtocol",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=8,
    )


if __name__ == "__main__":
    serve()
