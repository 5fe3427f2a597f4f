"""What is locked has hashes and no known vulnerability, and what is shipped is listed: `make check` and `make sbom`.

``python -m tests.supply_chain audit`` looks the locked versions up in an advisory feed. It exits 1 for a vulnerability
and for a package without hashes. Where the feed cannot be asked it says NOT CHECKED, no clean bill, and exits 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LOCK: Final = Path(__file__).parents[1] / "poetry.lock"
PROJECT: Final = LOCK.with_name("pyproject.toml")
FEED: Final = "https://api.osv.dev/v1/query"
FEED_TIMEOUT_SECONDS: Final = 10
AUDIT_SECONDS_MAX: Final = 300
WRONG_USE: Final = 2
"""How argparse exits: then it is our call of pip-audit that is wrong, not the network."""

CLEAN: Final = "no known vulnerabilities"
NOT_CHECKED: Final = "NOT CHECKED for known vulnerabilities"


@dataclass(frozen=True)
class LockedPackage:
    """One package of the lock; ``shipped`` says whether it is needed to run and not only to develop."""

    name: str
    version: str
    hashes: tuple[str, ...]
    shipped: bool


def locked_packages(lock: Path) -> list[LockedPackage]:
    """Every package that ``lock`` names."""
    document = tomllib.loads(lock.read_text())
    return [
        LockedPackage(
            name=package["name"],
            version=package["version"],
            hashes=tuple(file.get("hash", "") for file in package.get("files", [])),
            shipped="main" in package["groups"],
        )
        for package in document["package"]
    ]


def without_hashes(packages: Sequence[LockedPackage]) -> list[str]:
    """The names of those that could be replaced unnoticed: one of their files has no SHA-256, or they have none."""
    return [
        package.name
        for package in packages
        if not package.hashes or not all(text.startswith("sha256:") for text in package.hashes)
    ]


def requirements(packages: Sequence[LockedPackage]) -> str:
    """``packages`` as pip writes them, hashes and all."""
    lines = [
        " ".join([f"{package.name}=={package.version}", *(f"--hash={text}" for text in package.hashes)])
        for package in packages
    ]
    return "\n".join(lines) + "\n"


def audit(packages: Sequence[LockedPackage], feed: str) -> tuple[int, str]:
    """The exit code and the sentence for what ``feed``, which speaks OSV, knows of ``packages``."""
    if bare := without_hashes(packages):
        return 1, f"without hashes in the lock: {', '.join(bare)}"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements(packages))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--disable-pip", "--require-hashes"]
        command += ["--vulnerability-service", "osv", "--osv-url", feed, "--timeout", str(FEED_TIMEOUT_SECONDS)]
        command += ["--format", "json", "--progress-spinner", "off"]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=AUDIT_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            return 0, f"{NOT_CHECKED}: no end within {AUDIT_SECONDS_MAX} s"
    if done.returncode == WRONG_USE:
        return 1, done.stderr.strip()
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        # pip-audit writes its report whole or not at all.
        return 0, f"{NOT_CHECKED}: {(done.stderr.strip() or 'no answer').splitlines()[-1]}"
    vulnerable = [
        f"{package['name']} {package['version']}: {found_one['id']}"
        for package in found
        for found_one in package.get("vulns", [])
    ]
    if vulnerable:
        return 1, "\n".join(["known vulnerabilities:", *vulnerable])
    checked = {package["name"] for package in found if "vulns" in package}
    if missed := sorted({package.name for package in packages} - checked):
        return 0, f"{NOT_CHECKED}: {', '.join(missed)}; {CLEAN} in the other {len(checked)} packages"
    return 0, f"{CLEAN} in {len(checked)} packages"


def write_sbom(packages: Sequence[LockedPackage], output: Path) -> int:
    """Write the CycloneDX document of what is shipped, from the lock alone; the exit code of the program that does."""
    with tempfile.TemporaryDirectory() as directory:
        listed, project = Path(directory, "requirements.txt"), Path(directory, "pyproject.toml")
        listed.write_text(requirements([package for package in packages if package.shipped]))
        # The program takes every project with a [tool.poetry] table for one that is named there, as Poetry 1 had it.
        project.write_text(PROJECT.read_text().partition("\n[tool.")[0])
        command = [str(Path(sys.executable).with_name("cyclonedx-py")), "requirements", str(listed)]
        command += ["--pyproject", str(project), "--output-reproducible", "--output-file", str(output)]
        return subprocess.run(command, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.supply_chain", description=__doc__)
    parser.add_argument("step", choices=["audit", "sbom"])
    parser.add_argument("--lock", type=Path, default=LOCK)
    parser.add_argument("--feed", default=FEED, help="where OSV is spoken")
    parser.add_argument("--output", type=Path, default=Path("sbom.cdx.json"), help="of sbom")
    chosen = parser.parse_args(arguments)
    packages = locked_packages(chosen.lock)
    if chosen.step == "sbom":
        return write_sbom(packages, chosen.output)
    code, sentence = audit(packages, chosen.feed)
    print(f"{chosen.lock.name}: {sentence}")  # noqa: T201 - its output
    return code


if __name__ == "__main__":
    sys.exit(main())
