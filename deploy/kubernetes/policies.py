"""`python -m deploy.kubernetes.policies [--check]`: the NetworkPolicies, and the table of edges in
docs/deployment.md, made of edges.toml.

Policies add up: each namespace denies everything, and what a layer (base, dev, production) allows
is a policy of its own for each zone of ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deploy.kubernetes.edges import HERE, LAYERS, Edge, Table, Zone, load

DOCUMENT = HERE.parents[1] / "docs/deployment.md"
_BEGIN, _END = "<!-- edges: made by deploy/kubernetes/policies.py -->\n", "<!-- end -->\n"
_HEAD = "# Made by `make policies` of edges.toml; change that.\n"


def outputs(table: Table, document: str) -> dict[Path, str]:
    """Return what each file that is made is to hold. `document` is the page as it is."""
    files = {file(layer): _HEAD + _dump(policies(table, layer)) for layer in LAYERS}
    before, _, rest = document.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return {**files, DOCUMENT: before + _BEGIN + _markdown(table) + _END + after}


def file(layer: str) -> Path:
    """Return the file of a layer's policies."""
    folder = HERE / "base" if layer == "base" else HERE / "overlays" / layer
    return folder / "network-policies.yaml"


def policies(table: Table, layer: str) -> list[dict[str, Any]]:
    """Return the NetworkPolicies of a layer."""
    zones = [zone for zone in table.zones.values() if zone.namespace]
    edges = [edge for edge in table.edges if edge.layer == layer]
    namespaces = sorted({zone.namespace for zone in zones if zone.layer == layer})
    made = [_policy("deny-all", namespace, {}, [], []) for namespace in namespaces]
    for zone in zones:
        arriving = [_rule("from", edge.source, edge) for edge in edges if edge.target == zone]
        leaving = [_rule("to", edge.target, edge) for edge in edges if edge.source == zone]
        if arriving or leaving:
            name = zone.name if layer == "base" else f"{zone.name}-{layer}"
            made.append(_policy(name, zone.namespace, _labels(zone), arriving, leaving))
    return made


def _policy(
    name: str,
    namespace: str,
    pods: Mapping[str, str],
    arriving: Sequence[dict[str, Any]],
    leaving: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    spec: dict[str, Any] = {"podSelector": {"matchLabels": dict(pods)} if pods else {}}
    # What a policy of `deny-all` names without a rule is refused; what others don't name is theirs.
    spec["policyTypes"] = [
        kind
        for kind, rules in (("Ingress", arriving), ("Egress", leaving))
        if rules or name == "deny-all"
    ]
    spec |= {
        kind: list(rules) for kind, rules in (("ingress", arriving), ("egress", leaving)) if rules
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def _rule(direction: str, peer: Zone, edge: Edge) -> dict[str, Any]:
    ports = [
        {"protocol": protocol, "port": port}
        for port in edge.ports
        for protocol in edge.target.protocols
    ]
    return {direction: [_peer(peer)], "ports": ports}


def _peer(zone: Zone) -> dict[str, Any]:
    if zone.addresses:
        block: dict[str, Any] = {"cidr": zone.addresses}
        return {"ipBlock": block | ({"except": list(zone.excepted)} if zone.excepted else {})}
    if zone.foreign_namespace:
        peer = {"namespaceSelector": {"matchLabels": dict(zone.foreign_namespace)}}
        return peer | ({"podSelector": {"matchLabels": dict(zone.pods)}} if zone.pods else {})
    namespace = {"kubernetes.io/metadata.name": zone.namespace}
    return {
        "namespaceSelector": {"matchLabels": namespace},
        "podSelector": {"matchLabels": dict(_labels(zone))},
    }


def _labels(zone: Zone) -> Mapping[str, str]:
    return {"app.kubernetes.io/name": zone.name}


def _dump(documents: Sequence[dict[str, Any]]) -> str:
    return yaml.safe_dump_all(documents, sort_keys=False, explicit_start=True, width=100)


def _markdown(table: Table) -> str:
    lines = ["| from | to | port | where | for |", "| --- | --- | --- | --- | --- |"]
    for edge in table.edges:
        ports = ", ".join(map(str, edge.ports))
        where = "everywhere" if edge.layer == "base" else edge.layer
        lines.append(
            f"| {edge.source.name} | {edge.target.name} | {ports} | {where} | {edge.why} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the files; with --check, say which are not as they would be made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where one differs")
    check = parser.parse_args().check
    stale = [
        (path, text)
        for path, text in outputs(load(), DOCUMENT.read_text()).items()
        if not path.exists() or path.read_text() != text
    ]
    for path, text in stale:
        if check:
            print(f"{path} is not as edges.toml says", file=sys.stderr)  # noqa: T201
        else:
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
