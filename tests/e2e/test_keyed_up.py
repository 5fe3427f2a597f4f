"""``plimsoll up`` that asks for keys: its demo has one, and the lines it prints take one."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.harness import environment
from tests.integration.desk import bearer
from tests.integration.test_cli import Up, plimsoll

pytestmark = pytest.mark.e2e
DEADLINE_SECONDS = 15


def test_the_demo_has_a_key_of_its_own_and_the_printed_lines_take_one(data_dir: Path) -> None:
    running = Up(data_dir, "--demo", auth="on", log_level="debug")
    try:
        running.wait_for("the demo market opens")
        assert httpx.get(f"{running.url}/margin-report").json()["code"] == "key_required"
        made = plimsoll(
            "keys", "create", "--name", "me", "--scope", "read", "--scope", "operate", data_dir=str(data_dir)
        )
        key = made.stdout.strip()
        printed = dict(re.findall(r"^  (\w+) {2,}(\S.*)$", running.output, re.MULTILINE))
        for line, shown in ((printed["deposit"], '"balance":"10000"'), (printed["report"], '"alice"')):
            answer = subprocess.run(
                ["sh", "-c", line],
                check=True,
                capture_output=True,
                text=True,
                env=environment({"PLIMSOLL_API_KEY": key}),
            )
            assert shown in answer.stdout

        deadline = time.monotonic() + DEADLINE_SECONDS
        while "demo-" not in httpx.get(f"{running.url}/margin-report", headers=bearer(key)).text:
            assert time.monotonic() < deadline, "the demo does not trade"
            time.sleep(0.1)
        assert "demo of plimsoll up" in plimsoll("keys", "list", data_dir=str(data_dir)).stdout
    finally:
        stopped = running.stop()
    assert stopped == 0
    assert not re.search("plimsoll_[0-9a-f]{12}_[0-9a-f]", running.output)
