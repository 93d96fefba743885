"""Overlay `dev` on a real cluster: reviews, pods that die, restarts, edges, rotation, drain.

The tests stand in the order in which they are to run: each leaves the stack as it found it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest

from deploy.kubernetes import edges
from deploy.kubernetes.edges import Zone
from tests.harness.pages import block
from tests.kubernetes import versions
from tests.kubernetes.cluster import AGNHOST, DEPLOYMENTS, Cluster, at_once, soon
from tests.kubernetes.load import DIFF, last, load, one_review
from tests.kubernetes.manifests import of_kind, overlay, pods

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("tenant", "no_crash")]


def test_a_review_runs_on_the_customers_key(cluster: Cluster):
    output = cluster.byokeep("--json", "review", "--repo=acme/shop", "--diff=-", text=DIFF)
    review = last(output)
    assert review["state"] == "REVIEW_STATE_COMPLETED"
    assert len(review["findings"]) > 3
    trail = cluster.byokeep("key", "trail", "openai")
    assert re.search(r"plaintext existed in \d+ processes for \d+ ms", trail)
    assert "leases live now: 0" in trail


@pytest.mark.parametrize("name", ["orchestrator", "keyvault-data"])
def test_whoever_kills_a_pod_loses_no_review(cluster: Cluster, name: str):
    """Each of two, one after the other: what is left takes over, and the call that is open is paid
    for once. `make chaos` kills whoever is known to work on a review, at each step."""
    for pod in cluster.pods_of(name):
        with one_review(cluster, 6) as review:
            place = ("--namespace", DEPLOYMENTS[name], pod["metadata"]["name"])
            cluster.kubectl("delete", "pod", *place, "--grace-period=0", "--force")
            output, errors = review.communicate(timeout=240)
        assert review.returncode == 0, (output, errors)
        assert last(output)["state"] == "REVIEW_STATE_COMPLETED"
        assert len(cluster.emulator("GET", "/calls")["calls"]) == 1
        cluster.ready(name)


def test_a_killed_runners_open_call_is_not_made_again(cluster: Cluster):
    with one_review(cluster, 15) as review:
        for pod in cluster.pods_of("runner"):
            place = ("--namespace=byokeep-runner", pod["metadata"]["name"])
            cluster.kubectl("delete", "pod", *place, "--grace-period=0", "--force")
        output, errors = review.communicate(timeout=300)
    assert review.returncode == 7, (output, errors)
    assert "AMBIGUOUS" in output + errors
    assert len(cluster.emulator("GET", "/calls")["calls"]) == 1
    cluster.ready("runner")


def test_a_rolling_restart_of_each_service_fails_no_review(cluster: Cluster):
    with load(cluster) as ended:
        for name, namespace in DEPLOYMENTS.items():
            before = {pod["metadata"]["name"] for pod in cluster.pods_of(name)}
            cluster.kubectl("rollout", "restart", "--namespace", namespace, f"deployment/{name}")
            cluster.rolled_out(name)
            assert not before & {pod["metadata"]["name"] for pod in cluster.pods_of(name)}
    assert ended.keys() == {"completed"}, ended
    assert ended["completed"] > 100  # the faster the restarts, the fewer


def test_new_certificates_are_taken_up_and_fail_no_review(cluster: Cluster):
    before = at_once(lambda name: _serial(cluster, name), list(DEPLOYMENTS))
    restarts = _restarts(cluster)
    job = cluster.get("--namespace=byokeep-pki", "cronjob/pki")["spec"]["jobTemplate"]
    job["spec"]["template"]["spec"]["containers"][0]["args"].append("--renew")
    renewal = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"generateName": "pki-renew-"}}
    with load(cluster, 1.0) as ended:
        document = json.dumps(renewal | {"spec": job["spec"]})
        cluster.kubectl("create", "--namespace=byokeep-pki", "--filename=-", text=document)
        for name, serial in zip(DEPLOYMENTS, before, strict=True):
            soon(lambda n=name, s=serial: _serial(cluster, n) != s, f"{name} keeps its certificate")
    assert ended.keys() == {"completed"}, ended
    assert _restarts(cluster) == restarts


def _serial(cluster: Cluster, name: str) -> str:
    """Return the digest of the certificate that a zone's first pod presents, asked within it."""
    pod = cluster.pods_of(name)[0]["metadata"]
    code = (
        "import hashlib, ssl, sys; sys.stdout.write(hashlib.sha256(ssl.get_server_certificate("
        "('127.0.0.1', 8443)).encode()).hexdigest())"
    )
    place = ("--namespace", pod["namespace"], pod["name"])
    return cluster.kubectl("exec", *place, "--", "/opt/byokeep/bin/python", "-c", code)


def _restarts(cluster: Cluster) -> dict[str, int]:
    return {
        pod["metadata"]["name"]: pod["status"]["containerStatuses"][0]["restartCount"]
        for name in DEPLOYMENTS
        for pod in cluster.pods_of(name)
    }


def test_a_drained_node_keeps_a_pod_of_each_service(cluster: Cluster):
    """One node: what is evicted finds no other. The budgets keep what is left, and it serves."""
    names = ",".join(DEPLOYMENTS)
    [node] = [one["metadata"]["name"] for one in cluster.get("nodes")["items"]]
    try:
        cluster.kubectl(
            *("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=25s"),
            f"--pod-selector=app.kubernetes.io/name in ({names})",
            check=False,
        )
        for name in DEPLOYMENTS:
            phases = [pod["status"]["phase"] for pod in cluster.pods_of(name)]
            assert sorted(phases) == ["Pending", "Running"], (name, phases)
        output = cluster.byokeep("--json", "review", "--repo=acme/shop", "--diff=-", text=DIFF)
        assert last(output)["state"] == "REVIEW_STATE_COMPLETED"
    finally:
        cluster.kubectl("uncordon", node)
    for name in DEPLOYMENTS:
        cluster.ready(name)


# A pod with a zone's labels, never ready: no service leads to it, and every policy covers it.
_PROBE = {
    "apiVersion": "v1",
    "kind": "Pod",
    "spec": {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 0,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "probe",
                "image": AGNHOST,
                "args": ["netexec", "--http-port=9000"],
                "readinessProbe": {"exec": {"command": ["/bin/test", "-f", "/nowhere"]}},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
    },
}
_STRANGER = Zone("stranger", "dev", namespace="byokeep-stranger")
_MONITORING = "byokeep-monitoring"


@pytest.fixture(scope="module")
def probes(cluster: Cluster) -> Iterator[dict[str, tuple[Zone, str]]]:
    """A probe in each zone, and in two namespaces beside: by zone, with its address."""
    zones = [zone for zone in edges.load().zones.values() if zone.namespace]
    monitoring = Zone("monitoring", "base", namespace=_MONITORING)
    for name, labels in ((_STRANGER.namespace, ""), (_MONITORING, "byokeep.dev/monitoring=true")):
        cluster.kubectl("create", "namespace", name)
        if labels:
            cluster.kubectl("label", "namespace", name, labels)
    sources = [*zones, _STRANGER, monitoring]
    for zone in sources:
        metadata = {
            "name": f"probe-{zone.name}",
            "namespace": zone.namespace,
            "labels": {"app.kubernetes.io/name": zone.name},
        }
        document = json.dumps(_PROBE | {"metadata": metadata})
        cluster.kubectl("apply", "--filename=-", text=document)
    found: dict[str, tuple[Zone, str]] = {}

    def address(zone: Zone) -> str:
        place = (f"--namespace={zone.namespace}", f"pod/probe-{zone.name}")
        status: str = cluster.get(*place)["status"].get("podIP", "")
        return status

    try:
        for zone in sources:
            soon(lambda z=zone: bool(address(z)), f"no probe in {zone.name}")
            found[zone.name] = (zone, address(zone))
        yield found
    finally:
        for zone in sources:
            place = (f"--namespace={zone.namespace}", f"pod/probe-{zone.name}")
            cluster.kubectl("delete", *place, "--ignore-not-found", "--wait=false")
        for name in (_STRANGER.namespace, _MONITORING):
            cluster.kubectl("delete", "namespace", name, "--wait=false")


def test_every_edge_of_the_table_is_open_and_every_other_one_closed(cluster: Cluster, probes):
    table = edges.load()
    stated = {
        (edge.source.name, edge.target.name, port)
        for edge in table.edges
        if edge.layer in ("base", "dev")
        for port in edge.ports
    }
    targets = _targets(cluster, probes)

    def differing(source: str) -> list[str]:
        """Name what is not as stated; a policy may lag, so look twice."""
        for _ in range(3):
            wrong = _differing(cluster, probes[source][0], targets, stated)
            if not wrong:
                return []
            time.sleep(3)
        return wrong

    assert [line for lines in at_once(differing, list(probes)) for line in lines] == []


def _targets(cluster: Cluster, probes: dict[str, tuple[Zone, str]]) -> dict[tuple[str, int], str]:
    """Return an address for each zone and port: of its own pods where it serves, else the probe."""
    zones = edges.load().zones
    found = {(name, 9000): f"{address}:9000" for name, (_, address) in probes.items()}
    for name, (zone, _) in probes.items():
        for port in zone.ports:
            pods = [pod for pod in cluster.pods_of(name) if "probe-" not in pod["metadata"]["name"]]
            found[name, port] = f"{pods[0]['status']['podIP']}:{port}"
            if name in DEPLOYMENTS:
                found[name, 9464] = f"{pods[0]['status']['podIP']}:9464"
                found[name, 8081] = f"{pods[0]['status']['podIP']}:8081"
    dns = cluster.get("--namespace=kube-system", "service/kube-dns")["spec"]["clusterIP"]
    api = cluster.get("--namespace=default", "service/kubernetes")["spec"]["clusterIP"]
    found["dns", zones["dns"].ports[0]] = f"{dns}:53"
    found["kubernetes-api", 443] = f"{api}:443"
    # Outside: no such host answers here, but the node refuses what policies let through.
    found["providers", 443] = "203.0.113.1:443"
    return found


def _differing(
    cluster: Cluster, source: Zone, targets: dict[tuple[str, int], str], stated: set[tuple]
) -> list[str]:
    ours = {zone.name for zone in edges.load().zones.values() if zone.namespace}
    others = {
        (zone, port): address
        for (zone, port), address in targets.items()
        # What others than ours say to each other is theirs.
        if zone != source.name and (source.name in ours or zone in ours)
    }
    connect = "".join(
        f"(echo {zone} {port} $(/agnhost connect --timeout=2s {address} 2>&1 | head -1)) &\n"
        for (zone, port), address in others.items()
    )
    place = (f"--namespace={source.namespace}", f"probe-{source.name}")
    output = cluster.kubectl("exec", *place, "--", "/bin/sh", "-c", f"{connect}wait")
    wrong = []
    for line in output.splitlines():
        zone, port, *said = line.split()
        # TIMEOUT: a policy dropped it. Nothing said: connected. Anything else came from beyond.
        open_now = said[:1] != ["TIMEOUT"]
        should = (source.name, zone, int(port)) in stated
        # What dev lets speak with the API server's any address, it lets speak with the outside.
        should |= zone == "providers" and (source.name, "kubernetes-api", 443) in stated
        if zone not in ("providers", "kubernetes-api") and open_now and said:
            wrong.append(f"{source.name} → {zone}:{port} answered {' '.join(said)}")
        elif open_now != should:
            wrong.append(f"{source.name} → {zone}:{port} is {'open' if open_now else 'closed'}")
    if len(output.splitlines()) != len(others):
        wrong.append(f"{source.name}: {len(output.splitlines())} answers of {len(others)}")
    return wrong


def test_a_forgotten_policy_is_found(cluster: Cluster, probes):
    """Without the policies of two namespaces their zones reach each other, and the test says so."""
    names = ("byokeep-postgres", "byokeep-client")
    saved = [
        policy
        for name in names
        for policy in cluster.get("networkpolicies", f"--namespace={name}")["items"]
    ]
    try:
        for name in names:
            cluster.kubectl("delete", "networkpolicies", f"--namespace={name}", "--all")
        targets = {("postgres", 5432): _targets(cluster, probes)["postgres", 5432]}
        client = probes["client"][0]
        found = ["client → postgres:5432 is open"]
        soon(lambda: _differing(cluster, client, targets, set()) == found, "it was not found", 30)
    finally:
        for policy in saved:
            for field in ("resourceVersion", "uid", "creationTimestamp", "generation"):
                policy["metadata"].pop(field, None)
            cluster.kubectl("apply", "--filename=-", text=json.dumps(policy))


def test_server_takes_the_manifests_as_they_are(cluster: Cluster):
    """Server-side dry run, strict: also what the schemas say nothing of."""
    strictly = ("--dry-run=server", "--validate=strict")
    output = cluster.apply(versions.manifests("dev"), *strictly)
    assert "unchanged" in output


def test_what_production_mounts_is_made_as_the_page_says(cluster: Cluster, tmp_path):
    (tmp_path / "grant-keys").mkdir()
    for name in ("ca.pem", "vault-ca.pem", "grant-signing.pem", "grant-keys/orchestrator.pem"):
        (tmp_path / name).write_text("PEM")
    for zone in ("keyvault", "orchestrator"):
        (tmp_path / f"{zone}-database-url").write_text("postgresql://")
    said = cluster.shell(
        'kubectl() { command kubectl "$@" --dry-run=client --output=name; }\n'
        + block("docs/deployment.md", "mounted"),
        D=str(tmp_path),
    )
    documents = overlay("production")
    made = {f"configmap/{one['metadata']['name']}" for one in of_kind(documents, "ConfigMap")}
    made |= {f"secret/{one['spec']['secretName']}" for one in of_kind(documents, "Certificate")}
    mounted = {
        f"secret/{volume['secret']['secretName']}"
        if "secret" in volume
        else f"configmap/{volume['configMap']['name']}"
        for _, template in pods(documents)
        for volume in template["spec"]["volumes"]
        if volume.keys() & {"secret", "configMap"}
    }
    named = [line for line in said.splitlines() if not line.startswith("namespace/")]
    assert set(named) == mounted - made
    assert named.count("configmap/byokeep-ca") == 3
