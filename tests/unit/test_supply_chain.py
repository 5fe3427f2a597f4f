"""What is locked has hashes; a vulnerability fails the audit, and a feed that cannot be reached is no clean bill."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Final

import pytest

from tests.harness import free_port
from tests.supply_chain import CLEAN, LOCK, NOT_CHECKED, locked_packages, main, without_hashes

pytestmark = pytest.mark.skipif(not LOCK.exists(), reason="not a whole checkout")

ADVISORY: Final = {
    "id": "PYSEC-2026-1",
    "summary": "made up",
    "affected": [{"package": {"name": "two", "ecosystem": "PyPI"}, "ranges": []}],
}


class Feed(BaseHTTPRequestHandler):
    """An advisory feed: knows of one package, or answers something else altogether."""

    vulnerable: str | None = None
    status = 200
    instead: bytes | None = None
    asked: Final[list[str]] = []

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.asked.append(name)
        answer = json.dumps({"vulns": [ADVISORY]} if name == self.vulnerable else {}).encode()
        content = answer if self.instead is None else self.instead
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def feed(**behaviour: object) -> Iterator[str]:
    """The URL of a feed that behaves so."""
    handler = type("OneFeed", (Feed,), {**behaviour, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/query"
        server.shutdown()
        thread.join()


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """A lock of two packages."""
    path = tmp_path / "poetry.lock"
    digest = "sha256:" + "0" * 64
    path.write_text(
        "".join(
            f'[[package]]\nname = "{name}"\nversion = "1.0"\ngroups = ["main"]\n'
            f'files = [{{file = "{name}.whl", hash = "{digest}"}}]\n'
            for name in ("one", "two")
        )
    )
    return path


def audited(lock: Path, url: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["audit", "--lock", str(lock), "--feed", url])
    return code, capsys.readouterr().out


def test_every_package_of_the_lock_has_hashes_of_all_its_files() -> None:
    packages = locked_packages(LOCK)
    assert len(packages) > 100
    assert without_hashes(packages) == []


@pytest.mark.parametrize("files", ["[]", '[{file = "one.whl"}]', '[{file = "one.whl", hash = "md5:00"}]'])
def test_a_package_without_hashes_fails_the_audit(lock: Path, files: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = lock.read_text()
    first = text.index("files = ")
    lock.write_text(text[:first] + f"files = {files}" + text[text.index("\n", first) :])
    code, said = audited(lock, "http://127.0.0.1:9", capsys)
    assert code == 1
    assert "without hashes in the lock: one" in said


def test_a_vulnerability_fails_the_audit_and_is_named(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with feed(vulnerable="two") as url:
        code, said = audited(lock, url, capsys)
    assert code == 1
    assert "two 1.0: PYSEC-2026-1" in said
    assert CLEAN not in said


def test_the_whole_lock_is_looked_up_and_said_to_be_clean(capsys: pytest.CaptureFixture[str]) -> None:
    with feed() as url:
        code, said = audited(LOCK, url, capsys)
    assert (code, said) == (0, f"poetry.lock: {CLEAN} in {len(locked_packages(LOCK))} packages\n")


@pytest.mark.parametrize("behaviour", [{"status": 503}, {"instead": b"<html>Log in first</html>"}, None])
def test_a_feed_that_cannot_be_asked_is_said_to_be_so_and_fails_nothing(
    lock: Path, behaviour: dict[str, object] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if behaviour is None:
        code, said = audited(lock, f"http://127.0.0.1:{free_port()}", capsys)
    else:
        with feed(**behaviour) as url:
            code, said = audited(lock, url, capsys)
    assert code == 0
    assert NOT_CHECKED in said
    assert CLEAN not in said


def test_the_bill_of_materials_names_what_is_shipped_with_its_hashes(tmp_path: Path) -> None:
    output = tmp_path / "sbom.cdx.json"
    assert main(["sbom", "--output", str(output)]) == 0
    document = json.loads(output.read_text())
    assert document["bomFormat"] == "CycloneDX"
    project = tomllib.loads(LOCK.with_name("pyproject.toml").read_text())["project"]
    assert document["metadata"]["component"]["name"] == project["name"]
    shipped = {package.name: package for package in locked_packages(LOCK) if package.shipped}
    listed = {component["name"]: component for component in document["components"]}
    assert set(listed) == set(shipped)
    assert "fastapi" in listed
    assert "pytest" not in listed
    for name, component in listed.items():
        assert component["version"] == shipped[name].version
        assert component["externalReferences"][0]["hashes"]
