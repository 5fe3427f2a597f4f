"""``docker-compose.yml`` as it is written; that it runs is ``tests/e2e/test_compose_runs.py``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCUMENT: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
SERVICES: dict[str, dict[str, Any]] = DOCUMENT["services"]
OURS = ("migrate", "api", "watchdog-1", "watchdog-2")
SENTINELS = ("sentinel-1", "sentinel-2", "sentinel-3")
REPLICATED = {"redis-1", "redis-2", "redis-3", *SENTINELS}
SERVERS = tuple(name for name in SERVICES if name != "migrate")
VERSION = re.compile(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-\w[\w.]*)*")


def mounts(name: str) -> list[list[str]]:
    """Source, target and mode of each volume of a service."""
    return [volume.split(":") for volume in SERVICES[name].get("volumes", [])]


def test_it_is_what_the_compose_specification_takes() -> None:
    check = Path(sys.executable).parent / "check-jsonschema"
    checked = subprocess.run(
        [check, "--builtin-schema", "vendor.compose-spec", COMPOSE], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_it_has_the_whole_system() -> None:
    stores, watching = {"redis", "postgres"}, {"prometheus", "alertmanager", "grafana"}
    assert set(SERVICES) == {*stores, *REPLICATED, *OURS, *watching}
    assert {name for name in SERVICES if SERVICES[name].get("profiles")} == REPLICATED


@pytest.mark.parametrize("name", SERVERS)
def test_each_server_has_a_health_check_and_is_started_again(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", SERVICES)
def test_each_waits_for_what_it_needs_to_be_healthy(name: str) -> None:
    stores = dict.fromkeys(("redis", "postgres"), "service_healthy")
    started = stores | {"migrate": "service_completed_successfully"}
    wanted = {
        **dict.fromkeys(SENTINELS, dict.fromkeys(("redis-1", "redis-2", "redis-3"), "service_healthy")),
        "migrate": stores | dict.fromkeys(SENTINELS, "service_healthy"),
        **dict.fromkeys(("api", "watchdog-1", "watchdog-2"), started),
        "prometheus": {"alertmanager": "service_healthy"},
        "grafana": {"prometheus": "service_healthy"},
    }
    conditions = {on: how["condition"] for on, how in SERVICES[name].get("depends_on", {}).items()}
    assert conditions == wanted.get(name, {})
    optional = {on for on, how in SERVICES[name].get("depends_on", {}).items() if how.get("required") is False}
    assert optional == (set(SENTINELS) if name == "migrate" else set())


@pytest.mark.parametrize("name", SERVICES)
def test_each_runs_without_root_privileges_or_a_writable_root(name: str) -> None:
    service = SERVICES[name]
    assert service["user"].partition(":")[0] not in {"", "0", "root"}
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "network_mode"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_each_image_has_a_version(name: str) -> None:
    assert VERSION.fullmatch(SERVICES[name]["image"])


def test_our_image_is_built_from_pinned_images_and_does_not_run_as_root() -> None:
    dockerfile = (ROOT / SERVICES["api"]["build"]["dockerfile"]).read_text()
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert len(bases) == 2
    assert all(VERSION.fullmatch(base) for base in bases)
    assert re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE)[-1] == SERVICES["api"]["user"]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
    assert all((ROOT / source).exists() for line in copied for source in line.split())


def test_ports_are_published_on_the_loopback_only() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"api", "watchdog-1", "prometheus", "alertmanager", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_only_what_needs_the_stores_reaches_them() -> None:
    reaching = {name for name, service in SERVICES.items() if "stores" in service["networks"]}
    assert reaching == {"redis", "postgres", *REPLICATED, *OURS}
    assert DOCUMENT["networks"]["stores"]["internal"] is True


def test_it_needs_no_env_file() -> None:
    variables = re.findall(r"\$\{?(\w+)(:-[^}]*)?", COMPOSE.read_text())
    assert all(default for _name, default in variables)
    assert not any("env_file" in service for service in SERVICES.values())


def test_redis_answers_only_for_what_is_on_disk_and_drops_nothing() -> None:
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert (options["--appendonly"], options["--appendfsync"]) == ("yes", "always")
    assert options["--maxmemory-policy"] == "noeviction"
    assert (ROOT / "deploy" / "redis" / Path(options["--aclfile"]).name).exists()


def test_the_service_runs_as_a_role_that_does_not_own_the_tables() -> None:
    owner = SERVICES["postgres"]["environment"]["POSTGRES_USER"]
    for name in ("api", "watchdog-1", "watchdog-2"):
        assert f"//{owner}:" not in SERVICES[name]["environment"]["PLIMSOLL_DATABASE_URL"]
        assert "PLIMSOLL_MIGRATIONS_URL" not in SERVICES[name]["environment"]
    assert f"//{owner}:" in SERVICES["migrate"]["environment"]["PLIMSOLL_MIGRATIONS_URL"]


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_from_the_repository_exists_and_is_read_only(name: str) -> None:
    for source, _target, *mode in mounts(name):
        if source.startswith("."):
            assert (ROOT / source).is_dir(), source
            assert mode == ["ro"]
        else:
            assert source in DOCUMENT["volumes"]


def test_prometheus_scrapes_and_alerts_the_services_of_this_file() -> None:
    configured = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    scraped = {
        target
        for job in configured["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    }
    assert {"api:8000", "watchdog-1:8001", "watchdog-2:8001"} <= scraped
    (alerted,) = configured["alerting"]["alertmanagers"]
    assert alerted["static_configs"][0]["targets"] == ["alertmanager:9093"]
    files = {job["authorization"]["credentials_file"] for job in configured["scrape_configs"] if "authorization" in job}
    assert files == {f"/run/secrets/{name}" for name in SERVICES["prometheus"]["secrets"]}


def test_grafana_finds_its_source_of_data_and_its_dashboards() -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load(next((provisioning / "datasources").iterdir()).read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = yaml.safe_load(next((provisioning / "dashboards").iterdir()).read_text())["providers"]
    (mounted,) = [source for source, target, *_ in mounts("grafana") if target == provider["options"]["path"]]
    dashboards = [json.loads(path.read_text()) for path in sorted((ROOT / mounted).glob("*.json"))]
    assert dashboards
    assert len({dashboard["uid"] for dashboard in dashboards}) == len(dashboards)


def test_whoever_reaches_grafana_may_look_and_nobody_is_administrator() -> None:
    variables = SERVICES["grafana"]["environment"]
    assert (variables["GF_AUTH_ANONYMOUS_ENABLED"], variables["GF_AUTH_ANONYMOUS_ORG_ROLE"]) == ("true", "Viewer")
    assert variables["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert not any("PASSWORD" in name for name in variables)
