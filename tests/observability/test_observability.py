"""Rules, dashboard and metrics, held against each other and tried with the real Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from byokeep.testing import Stack

from deploy.local.ports import Ports
from deploy.local.processes import wait_for
from services.common import metrics
from services.keyvault import metrics as keyvault_metrics
from services.llm_runner import metrics as runner_metrics
from services.orchestrator import metrics as orchestrator_metrics
from tests.harness import tenants

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "observability"
RUNBOOKS = FOLDER.parents[1] / "docs" / "runbooks.md"
SERVICES = ("keyvault", "orchestrator", "runner")
# Loaded so that what they declare is in the registry.
DECLARED = (keyvault_metrics, orchestrator_metrics, runner_metrics)
_SUFFIX = re.compile(r"_(?:total|bucket|count|sum)$")


def dashboard_queries() -> list[str]:
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def names_in(text: str) -> set[str]:
    return {_SUFFIX.sub("", name) for name in re.findall(r"\bbyokeep_[a-z_]+", text)}


def exported() -> set[str]:
    return {
        _SUFFIX.sub("", family.name)
        for family in metrics.REGISTRY.collect()
        if family.name.startswith("byokeep_")
    }


def test_rules_and_config_are_what_prometheus_takes(tool) -> None:
    subprocess.run(
        [tool("promtool"), "check", "config", str(FOLDER / "prometheus.yaml")], check=True
    )


def test_each_alert_fires_and_is_silent_as_its_cases_say(tool) -> None:
    subprocess.run([tool("promtool"), "test", "rules", "alerts_test.yaml"], cwd=FOLDER, check=True)


def test_each_alert_has_a_case_that_fires_one_that_is_silent_and_a_runbook() -> None:
    rules, cases = (FOLDER / "alerts.yaml").read_text(), (FOLDER / "alerts_test.yaml").read_text()
    headings = {line[3:] for line in RUNBOOKS.read_text().splitlines() if line[:3] == "## "}
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert set(alerts) == headings
    for alert in alerts:
        assert f"runbook_url: docs/runbooks.md#{alert.lower()}" in rules
        asked = re.findall(rf"alertname: {alert}(\}}|\n +exp_alerts)", cases)
        assert sorted(bool(one.strip("}").strip()) for one in asked) == [False, True], alert


def test_every_query_asks_for_a_metric_that_is_exported() -> None:
    asked = names_in("\n".join([*dashboard_queries(), (FOLDER / "alerts.yaml").read_text()]))
    assert asked
    assert asked - exported() == set()


@pytest.mark.timeout(240)
def test_a_real_prometheus_scrapes_a_real_stack(tool, tmp_path) -> None:
    """Every panel's query gives data once a key was added and a review made; no scrape is slow."""
    ports = Ports()
    with Stack() as stack:
        tenant = tenants.create(stack, "acme")
        tenants.add_key(stack, tenant, "openai")
        with stack.connect("developer", tenant=tenant) as connection:
            tenants.review(connection, tenant)
        listen = f"127.0.0.1:{ports.reserve()}"
        (tmp_path / "prometheus.yaml").write_text(_config(stack))
        command = [
            tool("prometheus"),
            f"--config.file={tmp_path}/prometheus.yaml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address={listen}",
        ]
        ports.close()
        log = (tmp_path / "log").open("w")
        with log, subprocess.Popen(command, stdout=log, stderr=log) as prometheus:
            try:
                _look(listen)
            finally:
                prometheus.terminate()


def _config(stack: Stack) -> str:
    jobs = "".join(
        f"  - job_name: {service}\n    static_configs:"
        f" [{{targets: ['{stack.address(f'{service}-metrics')}']}}]\n"
        for service in SERVICES
    )
    return f"global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs:\n{jobs}"


def _look(listen: str) -> None:
    assert wait_for(lambda: len(_ask(listen, "byokeep_serving == 1")) == 3, 60)
    time.sleep(5)  # two samples make a rate
    for query in dashboard_queries():
        needs_vault = "byokeep_kek_call" in query
        rejected = 'outcome="KEY_REJECTED"' in query
        refused = "byokeep_refusals_total" in query
        died = "byokeep_background_deaths" in query
        if not (needs_vault or rejected or refused or died):
            found = _ask(listen, query.replace("$__rate_interval", "1m"))
            assert found, query
    slow = _ask(listen, "max(quantile_over_time(0.5, scrape_duration_seconds[1m]))")
    assert float(slow[0]["value"][1]) < 0.5


def _ask(listen: str, query: str) -> list[dict]:
    url = f"http://{listen}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.loads(answer.read())["data"]["result"]
    except OSError:
        return []
