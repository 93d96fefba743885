"""The cluster, brought up once for the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kubernetes import cluster as clusters
from tests.kubernetes.cluster import DEPLOYMENTS, Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster with overlay `dev`."""
    with clusters.running() as running:
        yield running


@pytest.fixture(scope="session")
def tenant(cluster: Cluster) -> str:
    """Tenant demo, with a key: made with the command, by each role."""
    # A cluster that was kept has them: what fails here fails the tests.
    cluster.byokeep("--profile=operator", "tenant", "create", "demo", check=False)
    roles = [f"--role={role}" for role in ("submitter", "key-admin", "auditor", "operator")]
    caller = "spiffe://byokeep.local/client/developer"
    cluster.byokeep("--profile=operator", "caller", "allow", caller, *roles)
    key = f"sk-proj-{'k8S' * 14}\n"
    cluster.byokeep("key", "add", "openai", "--stdin", text=key, check=False)
    return "demo"


@pytest.fixture
def no_crash(cluster: Cluster) -> Iterator[None]:
    """No service may end by itself, whatever a test does to it."""
    yield
    crashed = {
        pod["metadata"]["name"]: state["terminated"]["exitCode"]
        for name in DEPLOYMENTS
        for pod in cluster.pods_of(name)
        for status in pod["status"].get("containerStatuses", [])
        if "terminated" in (state := status["lastState"])
    }
    assert crashed == {}
