"""Runners follow the queue: component runner-hpa, with a stand-in for the metrics adapter that asks
the orchestrators' own metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.docker import images
from tests.kubernetes import external_metrics, versions
from tests.kubernetes.cluster import Cluster, soon
from tests.kubernetes.load import load
from tests.kubernetes.manifests import layered

pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("tenant", "no_crash")]
_NAMESPACE = "byokeep-metrics-adapter"
_NAMES = {"app.kubernetes.io/name": "external-metrics"}
_ADAPTER = [
    {
        "apiVersion": "v1",
        "kind": "Namespace",
        # What lets it ask the orchestrators for metrics.
        "metadata": {"name": _NAMESPACE, "labels": {"byokeep.dev/monitoring": "true"}},
    },
    {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "external-metrics", "namespace": _NAMESPACE, "labels": _NAMES},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "adapter",
                    "image": images.reference(versions.TOOLS, versions.tag("dev")),
                    "command": [
                        *("/opt/byokeep/bin/python", "-c"),
                        Path(external_metrics.__file__).read_text(),
                    ],
                    "readinessProbe": {"tcpSocket": {"port": 8443}, "periodSeconds": 1},
                }
            ],
        },
    },
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "external-metrics", "namespace": _NAMESPACE},
        "spec": {"selector": _NAMES, "ports": [{"port": 443, "targetPort": 8443}]},
    },
    {
        "apiVersion": "apiregistration.k8s.io/v1",
        "kind": "APIService",
        "metadata": {"name": "v1beta1.external.metrics.k8s.io"},
        "spec": {
            "group": "external.metrics.k8s.io",
            "version": "v1beta1",
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
            "insecureSkipTLSVerify": True,
            "service": {"name": "external-metrics", "namespace": _NAMESPACE},
        },
    },
]


@pytest.fixture
def adapter(cluster: Cluster) -> Iterator[None]:
    """The external metrics API, served."""
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": _ADAPTER})
    cluster.kubectl("apply", "--filename=-", text=text)
    api = "apiservice/v1beta1.external.metrics.k8s.io"
    try:
        cluster.patiently("wait", "--for=condition=Available", api)
        yield
    finally:
        cluster.kubectl("delete", api)
        cluster.kubectl("delete", "namespace", _NAMESPACE, "--wait=false")


# The component waits five minutes, then takes one runner away in two: a test's patience is less.
_DOWN_SOON = {
    "spec": {
        "behavior": {
            "scaleDown": {
                "stabilizationWindowSeconds": 0,
                "policies": [{"type": "Pods", "value": 1, "periodSeconds": 5}],
            }
        }
    }
}


def test_runners_become_more_where_reviews_wait_and_fewer_where_none_does(
    cluster: Cluster, adapter, tmp_path
):
    namespace = "--namespace=byokeep-runner"

    def running() -> int:
        return int(cluster.get(namespace, "deployment/runner")["status"].get("readyReplicas", 0))

    cluster.emulator("POST", "/latency", {"seconds": 20})
    try:
        folder = layered(tmp_path, "dev", "runner-hpa", versions.images_of("dev"))
        cluster.kubectl("apply", "--kustomize", str(folder))
        with load(cluster, 4.0, unfinished=48) as ended:
            soon(lambda: running() > 2, "nothing scaled the runners", 600)
            cluster.emulator("POST", "/latency", {"seconds": 0})
        assert ended.keys() == {"completed"}, ended
        # Long calls, so that each runner that goes has some.
        cluster.emulator("POST", "/latency", {"seconds": 5})
        with load(cluster, 2.0) as ended:
            cluster.kubectl("patch", namespace, "hpa/runner", "--patch", json.dumps(_DOWN_SOON))
            soon(lambda: running() == 2, "nothing took the runners away")
        assert ended.keys() == {"completed"}, ended
    finally:
        cluster.emulator("POST", "/latency", {"seconds": 0})
        cluster.kubectl("delete", namespace, "hpa/runner", "--ignore-not-found")
        cluster.apply(versions.manifests("dev"))
    cluster.rolled_out("runner")
    cluster.ready("runner")
