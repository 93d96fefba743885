"""The manifests as `kubectl kustomize` renders them, and what NetworkPolicies allow."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deploy.kubernetes.edges import HERE, Zone

OVERLAYS = ("dev", "production")
COMPONENTS = tuple(sorted(path.name for path in (HERE / "components").iterdir()))
CACHE = Path(os.environ.get("K8S_CACHE") or Path.home() / ".cache/k8s-local")
Document = dict[str, Any]


def kubectl() -> str:
    """Return the command. Raises RuntimeError where there is none."""
    found = shutil.which("kubectl") or shutil.which("kubectl", path=str(CACHE / "bin"))
    if found is None:
        raise RuntimeError("there is no kubectl: tests/kubernetes/node/build makes one")
    return found


@functools.cache
def rendered(folder: Path) -> tuple[Document, ...]:
    """Return every document of a kustomization."""
    done = subprocess.run(
        [kubectl(), "kustomize", str(folder)], check=True, capture_output=True, text=True
    )
    return tuple(yaml.safe_load_all(done.stdout))


def overlay(name: str) -> tuple[Document, ...]:
    """Return the documents of an overlay."""
    return rendered(HERE / "overlays" / name)


def layered(folder: Path, name: str, component: str, more: str = "") -> Path:
    """Write a kustomization that lays a component over an overlay, and return its folder."""
    base, over = (
        os.path.relpath(HERE / place, folder.resolve())
        for place in (f"overlays/{name}", f"components/{component}")
    )
    text = f"resources: [{base}]\ncomponents: [{over}]\n{more}"
    (folder / "kustomization.yaml").write_text(text)
    return folder


def of_kind(documents: Sequence[Document], *kinds: str) -> list[Document]:
    """Return those of some kinds."""
    return [document for document in documents if document["kind"] in kinds]


def pods(documents: Sequence[Document]) -> Iterator[tuple[Document, Document]]:
    """Give each workload with its pod template."""
    for workload in of_kind(documents, "Deployment", "StatefulSet", "Job"):
        yield workload, workload["spec"]["template"]
    for workload in of_kind(documents, "CronJob"):
        yield workload, workload["spec"]["jobTemplate"]["spec"]["template"]


def name_of(document: Document) -> str:
    """Say which one it is, for a person."""
    metadata = document["metadata"]
    return f"{document['kind']} {metadata.get('namespace', '')}/{metadata['name']}"


def allows(policies: Sequence[Document], source: Zone, target: Zone, port: int) -> bool:
    """Say whether policies let one zone's pods open TCP connections to another's, as the
    NetworkPolicy API defines it: both ends' policies, each the union of those that select it."""
    leaving = _allowed(policies, source, target, port, "Egress")
    arriving = _allowed(policies, target, source, port, "Ingress")
    return leaving and arriving


def _allowed(
    policies: Sequence[Document], subject: Zone, peer: Zone, port: int, direction: str
) -> bool:
    if not subject.namespace:
        return True  # not ours: nothing is known of its policies
    selecting = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == subject.namespace
        and direction in policy["spec"]["policyTypes"]
        and _matches(policy["spec"]["podSelector"], _labels(subject))
    ]
    side = "to" if direction == "Egress" else "from"
    rules = [rule for spec in selecting for rule in spec.get(direction.lower(), [])]
    return not selecting or any(
        any(_is_peer(each, peer) for each in rule[side])
        and any(each["port"] == port and each["protocol"] == "TCP" for each in rule["ports"])
        for rule in rules
    )


def _is_peer(peer: Document, zone: Zone) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        return (block["cidr"], block.get("except", [])) == (zone.addresses, list(zone.excepted))
    if zone.addresses:
        return False
    if zone.foreign_namespace:
        namespace: Mapping[str, str] = zone.foreign_namespace
    else:
        namespace = _NAMESPACES.get(zone.namespace, {}) | {
            "kubernetes.io/metadata.name": zone.namespace
        }
    return _matches(peer["namespaceSelector"], namespace) and (
        "podSelector" not in peer or _matches(peer["podSelector"], _labels(zone))
    )


# Labels that a namespace of ours has beside its name.
_NAMESPACES: dict[str, dict[str, str]] = {
    "byokeep-client": {"byokeep.dev/clients": "true", "byokeep.dev/operators": "true"}
}


def _labels(zone: Zone) -> Mapping[str, str]:
    return zone.pods or {"app.kubernetes.io/name": zone.name}


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items())
