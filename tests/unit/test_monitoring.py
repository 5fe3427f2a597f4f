"""Alerts, dashboards and runbooks: none names what is not there, and the tools they are made for accept them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.metrics_document import exported

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES_FILE = DEPLOY / "prometheus" / "rules.yml"
RULE_TESTS = sorted((DEPLOY / "prometheus").glob("*rules_test.yml"))
RUNBOOKS = {file.stem: file for file in (DEPLOY / "runbooks").glob("*.md") if file.stem != "README"}
DASHBOARDS: dict[str, dict[str, Any]] = {
    file.stem: json.loads(file.read_text()) for file in (DEPLOY / "grafana" / "dashboards").glob("*.json")
}
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES_FILE.read_text())["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
ALERT_NAMES = {rule["alert"] for rule in ALERTS}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
PANELS = [(uid, panel) for uid, dashboard in DASHBOARDS.items() for panel in dashboard["panels"]]
PANEL_NAMES = [f"{uid}: {panel['title']}" for uid, panel in PANELS]
QUERIES = [rule["expr"] for rule in RULES] + [target["expr"] for _uid, panel in PANELS for target in panel["targets"]]
SECTIONS = ["Meaning", "Impact", "Diagnosis", "Mitigation"]


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def names_in(query: str) -> set[str]:
    """The metrics and recorded series that a query names."""
    return set(re.findall(r"plimsoll[:_][a-z0-9_:]+", query))


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_names_series_that_are_exported_or_recorded(query: str) -> None:
    samples = {name for metric in exported().values() for name in metric.sample_names}
    assert names_in(query) <= samples | RECORDED
    assert names_in(query) or re.search(r"\bup\b", query)


@pytest.mark.parametrize("query", QUERIES)
def test_what_is_true_of_the_system_is_queried_by_max(query: str) -> None:
    system = {name for name, metric in exported().items() if metric.source == "system"}
    for found in re.finditer(r"plimsoll[:_][a-z0-9_:]+", query):
        if found[0] in system:
            assert re.search(r"\bmax( by \(\w+\))? ?\($", query[: found.start()]), query


@pytest.mark.parametrize("query", QUERIES)
def test_nothing_hides_behind_a_number_of_its_own(query: str) -> None:
    assert "vector(" not in query


def test_every_recorded_series_is_used() -> None:
    assert {name for query in QUERIES for name in names_in(query)} >= RECORDED


def test_every_metric_of_the_system_is_looked_at_somewhere() -> None:
    looked_at = {name for query in QUERIES for name in names_in(query)}
    assert {name for name, metric in exported().items() if not metric.sample_names & looked_at} == set()


def test_each_alert_has_its_runbook_and_each_runbook_its_alert() -> None:
    assert set(RUNBOOKS) == ALERT_NAMES
    for rule in ALERTS:
        assert rule["annotations"]["runbook"] == f"deploy/runbooks/{rule['alert']}.md"


@pytest.mark.parametrize("name", sorted(RUNBOOKS))
def test_a_runbook_says_what_it_means_what_it_does_how_to_look_and_what_to_do(name: str) -> None:
    text = RUNBOOKS[name].read_text()
    assert text.startswith(f"# {name}\n")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == SECTIONS
    for section in re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]:
        assert len(section.split()) >= 15, section
    assert "```sh" in text
    assert set(re.findall(r"Plimsoll[A-Z]\w+", text)) <= ALERT_NAMES
    metrics = exported()
    samples = {sample for metric in metrics.values() for sample in metric.sample_names} | set(metrics) | RECORDED
    assert names_in(text) - {"plimsoll_api_key"} <= samples
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (RUNBOOKS[name].parent / link).exists(), link


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_who_and_where(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert {"summary", "description", "runbook", "dashboard"} == set(rule["annotations"])
    assert rule["annotations"]["dashboard"].removeprefix("/d/") in DASHBOARDS
    assert rule["alert"] != "Watchdog"


@pytest.mark.parametrize("alert", sorted(ALERT_NAMES))
def test_each_alert_is_tested_silent_firing_and_silent_again(alert: str) -> None:
    silent_then_firing_then_silent = False
    for file in RULE_TESTS:
        for case in yaml.safe_load(file.read_text())["tests"]:
            steps = [bool(step["exp_samples"]) for step in case["promql_expr_test"] if f'"{alert}"' in step["expr"]]
            # One alert ends only with the targets themselves, so its case may be two.
            changes = [now for now, before in zip(steps, [None, *steps], strict=False) if now != before]
            silent_then_firing_then_silent |= changes[:3] == [False, True, False]
    assert silent_then_firing_then_silent


@pytest.mark.parametrize("file", RULE_TESTS, ids=lambda file: file.stem)
def test_the_alerts_fire_when_they_should_and_only_then(file: Path) -> None:
    tested = subprocess.run(
        [tool("promtool"), "test", "rules", file.name], cwd=file.parent, capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    promtool = tool("promtool")
    folder = tmp_path / "prometheus"
    shutil.copytree(DEPLOY / "prometheus", folder)
    (tmp_path / "key").write_text("")
    configuration = folder / "prometheus.yml"
    configuration.write_text(configuration.read_text().replace("/run/secrets/plimsoll_api_key", str(tmp_path / "key")))
    checked = subprocess.run([promtool, "check", "config", configuration], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alertmanager_accepts_its_configuration_and_makes_one_page_of_a_burst() -> None:
    amtool, file = tool("amtool"), DEPLOY / "alertmanager" / "alertmanager.yml"
    checked = subprocess.run([amtool, "check-config", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    configuration = yaml.safe_load(file.read_text())
    assert configuration["route"]["group_by"] == ["alertname"]
    for severity, receiver in (("page", "pager"), ("ticket", "tickets")):
        command = [amtool, "config", "routes", "test", f"--config.file={file}", "alertname=X", f"severity={severity}"]
        routed = subprocess.run(command, capture_output=True, text=True, check=True)
        assert routed.stdout.strip() == receiver
    for rule in configuration["inhibit_rules"]:
        named = re.findall(r"Plimsoll\w+", " ".join(rule["source_matchers"] + rule["target_matchers"]))
        assert named
        assert set(named) <= ALERT_NAMES


@pytest.mark.parametrize("uid", sorted(DASHBOARDS))
def test_a_dashboard_is_whole(uid: str) -> None:
    dashboard = DASHBOARDS[uid]
    assert dashboard["uid"] == uid
    assert "plimsoll" in dashboard["tags"]
    assert dashboard["title"]
    assert dashboard["description"]
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    assert len(set(titles)) == len(titles)
    boxes = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(box["x"] >= 0 and box["x"] + box["w"] <= 24 and box["h"] > 0 for box in boxes)
    for one, other in combinations(boxes, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


@pytest.mark.parametrize(("uid", "panel"), PANELS, ids=PANEL_NAMES)
def test_a_panel_says_what_it_shows_and_in_which_unit(uid: str, panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["type"] in {"stat", "timeseries", "bargauge"}
    assert defaults["unit"]
    assert defaults["thresholds"]["steps"][0]["value"] is None
    assert len(panel["description"]) > 5
    assert panel["targets"]
    for runbook in re.findall(r"deploy/runbooks/(\w+)\.md", panel["description"]):
        assert runbook in RUNBOOKS
    if len(defaults["thresholds"]["steps"]) > 1 and panel["type"] == "stat":
        assert "deploy/runbooks/" in panel["description"], "a colour that says nothing"


def test_the_dashboards_ask_the_data_source_that_is_provisioned() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    asked = {json.dumps(target["datasource"]) for _uid, panel in PANELS for target in panel["targets"]}
    assert asked == {json.dumps({"type": source["type"], "uid": source["uid"]})}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "plimsoll.yml").read_text())["providers"]
    compose = (DEPLOY.parent / "docker-compose.yml").read_text()
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in compose
