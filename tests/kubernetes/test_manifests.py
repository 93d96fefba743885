"""What every rendered manifest has to be: valid, restricted, and as the tables say."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence

import kubernetes_validate
import pytest
import yaml
from byokeep.common.v1 import options_pb2
from byokeep.orchestrator.v1 import review_pb2

from deploy.dev import pki
from deploy.kubernetes import edges, policies
from deploy.local.material import SERVER_NAMES
from services.common import authz
from services.common.metrics import REGISTRY
from services.keyvault.config import Settings as Keyvault
from services.llm_runner.config import Settings as Runner
from services.orchestrator import metrics
from services.orchestrator.config import Settings as Orchestrator
from tests.kubernetes.manifests import (
    COMPONENTS,
    OVERLAYS,
    Document,
    allows,
    layered,
    name_of,
    of_kind,
    overlay,
    pods,
    rendered,
)

_VERSIONS = [f"1.{minor}" for minor in range(31, 38)]
_CUSTOM = ("cert-manager.io", "cilium.io", "keda.sh")
_SETTINGS = {"keyvault": Keyvault, "orchestrator": Orchestrator, "runner": Runner}
# Who speaks with the Kubernetes API: in a development overlay alone.
_WITH_TOKEN = {
    "Job byokeep-pki/pki-first",
    "CronJob byokeep-pki/pki",
    "StatefulSet byokeep-openbao/openbao",
}
_LONGEST_CALL = {"keyvault-data": 10, "keyvault-admin": 10, "orchestrator": 900, "runner": 900}


@pytest.fixture(params=OVERLAYS)
def documents(request):
    """Each overlay's documents."""
    return overlay(request.param)


@pytest.mark.parametrize("version", _VERSIONS)
def test_it_fits_the_schemas(documents, version):
    for document in documents:
        # Custom resources have no schema there; the cluster's test holds them against their CRDs.
        if document["apiVersion"].partition("/")[0] not in _CUSTOM:
            kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_field_does_not_fit_the_schemas(documents):
    deployment = next(iter(of_kind(documents, "Deployment")))
    wrong = {**deployment, "spec": {**deployment["spec"], "replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, _VERSIONS[0], strict=True)


def test_each_namespace_is_restricted_and_denies_by_default(documents):
    namespaces = {one["metadata"]["name"]: one for one in of_kind(documents, "Namespace")}
    used = {one["metadata"]["namespace"] for one, _ in pods(documents)}
    assert used == set(namespaces)
    for namespace in namespaces.values():
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    denied = {
        one["metadata"]["namespace"]
        for one in of_kind(documents, "NetworkPolicy")
        if one["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    }
    assert denied == set(namespaces)


def test_each_pod_is_as_closed_as_it_can_be(documents):
    for workload, template in pods(documents):
        spec, what = template["spec"], name_of(workload)
        assert spec["enableServiceLinks"] is False, what
        assert (spec.get("automountServiceAccountToken", True) is False) != (what in _WITH_TOKEN), (
            what
        )
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, what
        assert security["runAsUser"] != 0, what
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, what
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, what
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}, what
            assert "memory" in container["resources"]["limits"], what
            tag = container["image"].rpartition("/")[2].partition(":")[2]
            assert tag and tag != "latest", what  # noqa: PT018 one thing
            assert not [one for one in container["volumeMounts"] if "subPath" in one], what


def test_no_secret_goes_through_the_environment(documents):
    for workload, template in pods(documents):
        for container in template["spec"]["containers"]:
            what = name_of(workload)
            assert not [one for one in container.get("env", []) if "valueFrom" in one], what
            assert not [one for one in container.get("envFrom", []) if "secretRef" in one], what
    assert of_kind(documents, "Secret") == []


def test_secrets_are_mounted_for_the_pods_group_alone(documents):
    for workload, template in pods(documents):
        for volume in template["spec"].get("volumes", []):
            if "secret" in volume:
                assert volume["secret"]["defaultMode"] == 0o440, name_of(workload)
                assert template["spec"]["securityContext"]["fsGroup"], name_of(workload)


def test_keyvault_alone_has_a_token_and_it_is_for_vault(documents):
    found = {}
    for workload, template in pods(documents):
        for volume in template["spec"].get("volumes", []):
            for source in volume.get("projected", {}).get("sources", []):
                if "serviceAccountToken" in source:
                    found[workload["metadata"]["name"]] = source["serviceAccountToken"]["audience"]
    migration = next(name for name in found if name.startswith("keyvault-migrate"))
    assert found == {"keyvault-data": "vault", "keyvault-admin": "vault", migration: "vault"}


def test_a_service_is_replaced_without_a_gap(documents):
    budgets = {
        (one["metadata"]["namespace"], str(one["spec"]["selector"])): one
        for one in of_kind(documents, "PodDisruptionBudget")
    }
    deployments = of_kind(documents, "Deployment")
    assert {one["metadata"]["name"] for one in deployments} == set(_LONGEST_CALL)
    for deployment in deployments:
        what, spec = name_of(deployment), deployment["spec"]
        pod = spec["template"]["spec"]
        container = pod["containers"][0]
        assert spec["replicas"] >= 2, what
        assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0, what
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        longest = _LONGEST_CALL[deployment["metadata"]["name"]]
        assert pod["terminationGracePeriodSeconds"] > pause + longest, what
        assert pod["topologySpreadConstraints"][0]["topologyKey"] == "kubernetes.io/hostname", what
        key = (deployment["metadata"]["namespace"], str(spec["selector"]))
        assert budgets.pop(key)["spec"]["maxUnavailable"] == 1, what
        # Liveness must not fail of what the service depends on; readiness has to.
        assert container["livenessProbe"]["grpc"] == {"port": 8081, "service": "live"}, what
        assert container["startupProbe"]["grpc"] == {"port": 8081, "service": "live"}, what
        assert container["readinessProbe"]["grpc"] == {"port": 8081}, what
    assert budgets == {}


def test_each_service_is_headless_and_selects_pods(documents):
    labels = [template["metadata"]["labels"] for _, template in pods(documents)]
    for service in of_kind(documents, "Service"):
        selector = service["spec"]["selector"]
        assert any(selector.items() <= each.items() for each in labels), name_of(service)
    ours = [
        one for one in of_kind(documents, "Service") if one["metadata"]["name"] in _LONGEST_CALL
    ]
    assert len(ours) == len(_LONGEST_CALL)
    assert {one["spec"]["clusterIP"] for one in ours} == {"None"}


def test_each_setting_is_one_and_none_is_missing(documents):
    config = {one["metadata"]["name"]: one["data"] for one in of_kind(documents, "ConfigMap")}
    for deployment in of_kind(documents, "Deployment"):
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        given = {one["name"] for one in container["env"]}
        for source in container["envFrom"]:
            given |= config[source["configMapRef"]["name"]].keys()
        settings = dataclasses.fields(_SETTINGS[deployment["metadata"]["name"].partition("-")[0]])
        known = {f"BYOKEEP_{one.name.upper()}" for one in settings}
        needed = {
            f"BYOKEEP_{one.name.upper()}" for one in settings if one.default is dataclasses.MISSING
        }
        assert given - known == set(), name_of(deployment)
        assert needed - given == set(), name_of(deployment)


def test_what_is_mounted_is_there(documents):
    """Each ConfigMap or Secret that a pod mounts is made here, or is in the document's list."""
    page = policies.DOCUMENT.read_text()
    made = {one["metadata"]["name"] for one in of_kind(documents, "ConfigMap")}
    made |= {one["spec"]["secretName"] for one in of_kind(documents, "Certificate")}
    if any(workload["metadata"]["name"] == "pki-first" for workload, _ in pods(documents)):
        made |= {leaf.secret for leaf in pki.LEAVES}
    base = {one["metadata"]["namespace"] for one, _ in pods(rendered(policies.HERE / "base"))}
    for workload, template in pods(documents):
        if workload["metadata"]["namespace"] not in base:
            continue
        for volume in template["spec"]["volumes"]:
            secret, config = volume.get("secret", {}), volume.get("configMap", {})
            name = secret.get("secretName") or config.get("name")
            known = name is None or name in made or f"`{name}`" in page or name == "provider-ca"
            assert known, f"{name_of(workload)} mounts {name}"


def test_a_migration_is_named_after_its_version(documents):
    project = tomllib.loads((policies.HERE.parents[1] / "pyproject.toml").read_text())["project"]
    suffix = "-v" + project["version"].replace(".", "-")
    jobs = {one["metadata"]["name"] for one in of_kind(documents, "Job")} - {"pki-first"}
    assert jobs == {f"keyvault-migrate{suffix}", f"orchestrator-migrate{suffix}"}


def test_certificates_have_the_names_that_callers_ask_for():
    documents = overlay("production")
    config = {
        one["metadata"]["name"].partition("-")[0]: one["data"]
        for one in of_kind(documents, "ConfigMap")
    }
    classes = {}
    for certificate in of_kind(documents, "Certificate"):
        zone = certificate["metadata"]["name"].partition("-")[0]
        assert certificate["spec"]["dnsNames"] == [SERVER_NAMES[zone]]
        [uri] = certificate["spec"]["uris"]
        for callee, data in config.items():
            known = authz.CallerClasses(data["BYOKEEP_CALLERS"], data["BYOKEEP_TRUST_DOMAIN"])
            classes[zone, callee] = known.identify(uri).classes
    assert classes["orchestrator", "keyvault"] == {options_pb2.CALLER_CLASS_ORCHESTRATOR}
    assert classes["runner", "keyvault"] == {options_pb2.CALLER_CLASS_RUNNER}
    assert classes["orchestrator", "runner"] == {options_pb2.CALLER_CLASS_ORCHESTRATOR}
    assert classes["keyvault", "orchestrator"] == classes["runner", "orchestrator"] == set()


# What lies beside a component in the same folder: images that have boto3.
_BESIDE = {
    "aws-kms": """images:
  - name: registry.example.com/byokeep/keyvault
    newName: registry.example.com/byokeep/keyvault-aws-kms
"""
}


@pytest.fixture(params=COMPONENTS)
def laid_over(request, tmp_path) -> tuple[str, Sequence[Document]]:
    """A component, and the documents of production with it."""
    folder = layered(tmp_path, "production", request.param, _BESIDE.get(request.param, ""))
    return request.param, rendered(folder)


def test_a_component_changes_production_and_fits_the_schemas(laid_over):
    _, documents = laid_over
    changed = [one for one in documents if one not in overlay("production")]
    assert changed
    for version in _VERSIONS:
        for document in changed:
            if document["apiVersion"].partition("/")[0] not in _CUSTOM:
                kubernetes_validate.validate(document, version, strict=True)


def test_a_component_does_what_it_is_for(laid_over):
    component, documents = laid_over
    named = {name_of(one): one["spec"] for one in documents if "spec" in one}
    runner = named["Deployment byokeep-runner/runner"]
    egress = str(named["NetworkPolicy byokeep-runner/runner"]["egress"])
    images = {
        template["spec"]["containers"][0]["image"].rpartition("/")[2].partition(":")[0]
        for workload, template in pods(documents)
        if workload["metadata"]["namespace"] == "byokeep-keyvault"
    }
    scaled = component in ("runner-hpa", "runner-keda")
    assert ("replicas" in runner) != scaled, "an overlay must not undo what an autoscaler did"
    assert ("ipBlock" in egress) != (component == "cilium-fqdn")
    assert images == {"keyvault-aws-kms" if component == "aws-kms" else "keyvault"}


def test_autoscalers_ask_for_a_metric_and_a_reason_that_there_are():

    metrics.show_waiting([])
    shown = {one.name for family in REGISTRY.collect() for one in family.samples}
    components = policies.HERE / "components"
    hpa = yaml.safe_load((components / "runner-hpa/autoscaler.yaml").read_text())
    metric = hpa["spec"]["metrics"][0]["external"]["metric"]
    [wanted] = metric["selector"]["matchExpressions"]
    assert metric["name"] in shown
    assert (wanted["key"], wanted["operator"]) == ("reason", "In")
    # For its turn, and what the fleet says where no runner has room.
    assert set(wanted["values"]) == {"TURN", "RUNNERS_FULL"}
    assert "FAILURE_REASON_RUNNERS_FULL" in dict(review_pb2.FailureReason.items())
    keda = yaml.safe_load((components / "runner-keda/scaledobject.yaml").read_text())
    query = keda["spec"]["triggers"][0]["metadata"]["query"]
    assert f'{metric["name"]}{{reason=~"{"|".join(wanted["values"])}"}}' in query
    for field in ("minReplicas", "maxReplicas"):
        assert hpa["spec"][field] == keda["spec"][field.replace("Replicas", "ReplicaCount")]
    assert hpa["spec"]["minReplicas"] >= 2


@pytest.mark.parametrize("layer", OVERLAYS)
def test_policies_allow_what_the_table_says_and_nothing_else(layer):
    table = edges.load()
    found = of_kind(overlay(layer), "NetworkPolicy")
    zones = [zone for zone in table.zones.values() if zone.layer in ("base", layer)]
    ports = sorted({port for edge in table.edges for port in edge.ports})
    stated = {
        (edge.source.name, edge.target.name, port)
        for edge in table.edges
        if edge.layer in ("base", layer)
        for port in edge.ports
    }
    allowed = {
        (source.name, target.name, port)
        for source in zones
        for target in zones
        for port in ports
        if source is not target and (source.namespace or target.namespace)
        if allows(found, source, target, port)
    }
    assert allowed == stated


def test_what_is_made_of_the_table_is_as_it_would_be_made():
    made = policies.outputs(edges.load(), policies.DOCUMENT.read_text())
    assert [path for path, text in made.items() if path.read_text() != text] == []


def test_the_table_refuses_an_edge_to_nowhere(tmp_path):
    file = tmp_path / "edges.toml"
    file.write_text('[zones.a]\nnamespace = "a"\n[[edges]]\nfrom = ["a"]\nto = "a"\nwhy = ""\n')
    with pytest.raises(KeyError, match="no port"):
        edges.load(file)
