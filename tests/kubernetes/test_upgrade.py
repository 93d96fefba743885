"""Upgrades, as deploy/kubernetes/upgrades.toml lists them: each under reviews, none of which fails.

The last of the tests: the cluster's schemas are newer than its code's afterwards.
"""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest

from deploy.kubernetes.edges import HERE
from tests.kubernetes import versions
from tests.kubernetes.cluster import DEPLOYMENTS, Cluster, soon
from tests.kubernetes.load import DIFF, last, load
from tests.kubernetes.manifests import of_kind

pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("tenant", "no_crash")]
_EDGES = tomllib.loads((HERE / "upgrades.toml").read_text())["edges"]


@pytest.mark.parametrize("edge", _EDGES, ids=lambda edge: f"{edge['from']}-{edge['to']}")
def test_an_upgrade_fails_no_review(cluster: Cluster, edge: dict[str, str]):
    documents = versions.manifests(edge["to"])
    services = [one for one in documents if one["kind"] != "Job"]
    assert _running(cluster) == {edge["from"]}, "the edges are walked in their order"
    with load(cluster) as ended:
        if edge["migrate"] == "first":
            _migrate(cluster, documents, edge["to"])
            # What runs is older than its schema now.
            _review(cluster)
        cluster.apply(services)
        if edge["migrate"] == "last":
            soon(lambda: _waits_for_schema(cluster), "no new pod says that it waits for its schema")
            assert _running(cluster, ready=True) == {edge["from"]}
            _review(cluster)
            _migrate(cluster, documents, edge["to"])
        for name in DEPLOYMENTS:
            cluster.rolled_out(name)
    assert ended.keys() == {"completed"}, ended
    assert _running(cluster) == {edge["to"]}
    _review(cluster)


def test_the_edges_make_a_way_from_this_commit_on():
    assert _EDGES[0]["from"] == "dev"
    assert [edge["to"] for edge in _EDGES[:-1]] == [edge["from"] for edge in _EDGES[1:]]
    assert {edge["migrate"] for edge in _EDGES} == {"never", "first", "last"}


def _migrate(cluster: Cluster, documents: list[Any], version: str) -> None:
    """Run the migrations' jobs, as of a version of their own."""
    for job in of_kind(documents, "Job"):
        name, place = job["metadata"]["name"], f"--namespace={job['metadata']['namespace']}"
        if "migrate" in name:
            job["metadata"]["name"] = f"{name}-{version}"
            cluster.apply([job])
            done = (f"job/{name}-{version}", "--for=condition=Complete")
            cluster.patiently("wait", place, *done)


def _review(cluster: Cluster) -> None:
    output = cluster.byokeep("--json", "review", "--repo=acme/shop", "--diff=-", text=DIFF)
    assert last(output)["state"] == "REVIEW_STATE_COMPLETED"


def _running(cluster: Cluster, *, ready: bool = False) -> set[str]:
    """Return the versions of services' pods; or of those that are ready and have a schema."""
    return {
        pod["spec"]["containers"][0]["image"].rpartition(versions.tag(""))[2]
        for name in DEPLOYMENTS
        if not ready or name != "runner"  # which has none, and need not wait
        for pod in cluster.pods_of(name)
        if not ready
        or any(
            one["type"] == "Ready" and one["status"] == "True"
            for one in pod["status"].get("conditions", [])
        )
    }


def _waits_for_schema(cluster: Cluster) -> bool:
    """Whether a new pod of each service with a database says so."""
    return all(
        any(_says_so(cluster, pod["metadata"]) for pod in cluster.pods_of(name))
        for name in DEPLOYMENTS
        if name != "runner"
    )


def _says_so(cluster: Cluster, pod: Any) -> bool:
    place = (f"--namespace={pod['namespace']}", pod["name"])
    # A container that is not made yet has no log.
    log = cluster.kubectl("logs", *place, check=False)
    events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return any(one["event"] == "waiting" and one["what"] == "schema" for one in events)
