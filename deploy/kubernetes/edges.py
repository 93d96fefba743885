"""The table of edges between zones, read once for policies, tests and documents."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAYERS = ("base", "dev", "production")


@dataclass(frozen=True, slots=True)
class Zone:
    """Pods of a namespace of ours (`namespace`), of others (`foreign_namespace`, labels), or
    addresses. `layer` is the set of manifests that has it."""

    name: str
    layer: str
    ports: Sequence[int] = ()
    protocols: Sequence[str] = ("TCP",)
    namespace: str = ""
    foreign_namespace: Mapping[str, str] = field(default_factory=dict)
    pods: Mapping[str, str] = field(default_factory=dict)
    addresses: str = ""
    excepted: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Edge:
    """One zone may open connections to another, on these ports."""

    source: Zone
    target: Zone
    ports: Sequence[int]
    layer: str
    why: str


@dataclass(frozen=True, slots=True)
class Table:
    """The whole table."""

    zones: Mapping[str, Zone]
    edges: Sequence[Edge]


def load(file: Path = HERE / "edges.toml") -> Table:
    """Read the table. Raises KeyError for an edge to a zone that is not there, or has no port."""
    raw = tomllib.loads(file.read_text())
    zones = {name: _zone(name, values) for name, values in raw["zones"].items()}
    edges = []
    for values in raw["edges"]:
        target = zones[values["to"]]
        ports = (values["port"],) if "port" in values else target.ports
        if not ports:
            raise KeyError(f"an edge leads to zone {target.name}, which has no port")
        layer = values.get("in", "base")
        edges += [Edge(zones[name], target, ports, layer, values["why"]) for name in values["from"]]
    return Table(zones, edges)


def _zone(name: str, values: Mapping[str, object]) -> Zone:
    known = dict(values)
    port = known.pop("port", None)
    known.setdefault("ports", () if port is None else (port,))
    known["layer"] = known.pop("in", "base")
    known["excepted"] = known.pop("except", ())
    return Zone(name, **known)  # type: ignore[arg-type]
