"""The units of ``deploy/systemd``: what systemd itself says of them, and that they run what exists."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli import GRACEFUL_SHUTDOWN_SECONDS
from app.cli import app as command

UNITS = sorted((Path(__file__).parents[2] / "deploy" / "systemd").glob("*.service"))
EXPOSURE_MAX = 20
"""Of `systemd-analyze security`, in tenths: 0 is locked up, 100 has no bounds at all."""

on_each = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: str(unit.name))
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def section(unit: Path, name: str) -> dict[str, str]:
    """The settings of one section; of one that stands there twice, the last."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's names have capitals
    parser.read(unit)
    return dict(parser[name])


def test_there_is_a_unit_for_each_process() -> None:
    names = {unit.name for unit in UNITS}
    assert names == {"plimsoll-api.service", "plimsoll-migrate.service", "plimsoll-watchdog@.service"}


@on_each
def test_a_unit_runs_a_command_that_exists(unit: Path) -> None:
    program, subcommand = section(unit, "Service")["ExecStart"].split()
    assert program == "/opt/plimsoll/.venv/bin/plimsoll"
    assert subcommand in {found.callback.__name__ for found in command.registered_commands if found.callback}


@on_each
def test_a_unit_starts_after_the_migrations_and_has_time_to_stop(unit: Path) -> None:
    if unit.name == "plimsoll-migrate.service":
        assert section(unit, "Service")["Type"] == "oneshot"
        return
    assert "plimsoll-migrate.service" in section(unit, "Unit")["Wants"].split()
    assert "plimsoll-migrate.service" in section(unit, "Unit")["After"].split()
    assert section(unit, "Service")["Restart"] == "always"
    assert int(section(unit, "Service")["TimeoutStopSec"].removesuffix("s")) > GRACEFUL_SHUTDOWN_SECONDS


@on_each
def test_no_unit_holds_a_password(unit: Path) -> None:
    assert re.findall(r"(?i)password|secret|://\S+:\S+@", unit.read_text()) == []


@needs_systemd
def test_systemd_takes_the_units_as_they_are(tmp_path: Path) -> None:
    for unit in UNITS:
        # The programs are where the tests run from: systemd looks whether they are there.
        here = unit.read_text().replace("/opt/plimsoll/.venv/bin", str(Path(sys.executable).parent))
        (tmp_path / unit.name).write_text(here.replace("User=plimsoll", "User=daemon").replace("Group=plimsoll", ""))
    copies = [tmp_path / unit.name.replace("@.", "@8001.") for unit in UNITS]
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *copies],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (checked.returncode, checked.stderr) == (0, "")


@needs_systemd
@on_each
def test_a_unit_is_shut_in(unit: Path) -> None:
    checked = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", "--no-pager", unit],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
