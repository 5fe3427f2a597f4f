"""What the numbers were measured on: processor, memory, kernel and versions. No names of machines."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Final

import psutil

from app.embedded_postgres import PostgresServer
from app.embedded_redis import RedisServer

PACKAGES: Final = (
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
    "pydantic",
    "orjson",
    "redis",
    "hiredis",
    "asyncpg",
    "sqlalchemy",
    "numpy",
)


def describe() -> list[tuple[str, str]]:
    """Pairs of a heading and what it is."""
    with tempfile.TemporaryDirectory() as directory:
        redis, postgres = RedisServer(Path(directory)).version, PostgresServer(Path(directory)).version
    return [
        ("Processor", f"{_processor()}, {len(os.sched_getaffinity(0))} cores for everything"),
        ("Memory", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"),
        ("Kernel", f"{platform.system()} {platform.release().partition('-')[0]}, {platform.machine()}"),
        ("Python", platform.python_version()),
        ("Redis", f"{redis}, embedded, append-only file synced at every write"),
        ("Postgres", f"{postgres}, embedded, its own defaults"),
        ("wrk", _wrk_version()),
        ("Packages", ", ".join(f"{name} {version(name)}" for name in PACKAGES)),
    ]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _wrk_version() -> str:
    program = shutil.which("wrk")
    if program is None:
        return "not installed"
    said = subprocess.run([program, "-v"], check=False, capture_output=True, text=True, timeout=5)
    return (said.stdout or said.stderr).split("[")[0].removeprefix("wrk").strip()
