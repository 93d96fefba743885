"""The Compose file: its networks are the edges of the table, and its settings are settings."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import yaml

from deploy.compose.__main__ import HERE
from deploy.kubernetes import edges
from services.keyvault.config import Settings as Keyvault
from services.llm_runner.config import Settings as Runner
from services.orchestrator.config import Settings as Orchestrator

_SETTINGS = {"keyvault": Keyvault, "orchestrator": Orchestrator, "runner": Runner}


@pytest.fixture(scope="module")
def services():
    """The file's services."""
    return yaml.safe_load((HERE / "compose.yaml").read_text())["services"]


def test_two_services_share_a_network_where_there_is_an_edge_between_them(services):
    stated = {
        frozenset((edge.source.name, edge.target.name))
        for edge in edges.load().edges
        if edge.layer in ("base", "dev") and {edge.source.name, edge.target.name} <= set(services)
    }
    sharing = {
        frozenset((one, other))
        for one, other in itertools.combinations(services, 2)
        if set(services[one].get("networks", ())) & set(services[other].get("networks", ()))
    }
    assert sharing == stated


def test_each_container_is_closed(services):
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("networks") or service["network_mode"] == "none", name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_each_setting_is_one_and_none_is_missing(services):
    for name in ("keyvault-data", "keyvault-admin", "orchestrator", "runner"):
        fields = dataclasses.fields(_SETTINGS[name.partition("-")[0]])
        known = {f"BYOKEEP_{one.name.upper()}" for one in fields}
        needed = {
            f"BYOKEEP_{one.name.upper()}" for one in fields if one.default is dataclasses.MISSING
        }
        given = set(services[name]["environment"])
        assert given - known == set(), name
        assert needed - given == set(), name
