"""Custom resources against their own definitions, by a real API server: structure and rules."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.kubernetes import crds
from tests.kubernetes.cluster import Cluster, at_once, soon
from tests.kubernetes.manifests import COMPONENTS, Document, layered, name_of, overlay, rendered

pytestmark = pytest.mark.timeout(900)


def _key(document: Document) -> tuple[str, str]:
    return document["apiVersion"].partition("/")[0], document["kind"]


@pytest.fixture(scope="module")
def custom(tmp_path_factory) -> list[Document]:
    """Every custom resource of overlay `production` and of the components."""
    found = [one for one in overlay("production") if _key(one) in crds.DEFINITIONS]
    for component in COMPONENTS:
        folder = layered(tmp_path_factory.mktemp(component), "production", component)
        found += [one for one in rendered(folder) if _key(one) in crds.DEFINITIONS]
    return list({name_of(one): one for one in found}.values())


@pytest.fixture(scope="module")
def defined(cluster: Cluster) -> Iterator[None]:
    """The definitions, for as long as the tests last; their controllers are not there."""
    files = [str(file) for file in at_once(crds.file, list(crds.DEFINITIONS.values()))]
    named = [f"--filename={file}" for file in files]

    def established() -> bool:
        """Ask for it: `kubectl wait` fails where a definition has no conditions yet."""
        return all(
            any(one["type"] == "Established" for one in item["status"].get("conditions") or ())
            for item in cluster.get(*named)["items"]
        )

    try:
        # Client-side apply would keep a copy in an annotation, for which they are too large.
        cluster.kubectl("apply", "--server-side", *named)
        soon(established, "the definitions are not taken")
        yield
    finally:
        cluster.kubectl("delete", "--wait=false", *named)


def _try(cluster: Cluster, document: Document) -> None:
    cluster.kubectl(
        *("create", "--dry-run=server", "--validate=strict", "--filename=-"),
        text=json.dumps(document),
    )


def test_custom_resources_are_what_their_definitions_say(cluster: Cluster, defined, custom):
    assert {_key(one) for one in custom} == set(crds.DEFINITIONS)
    at_once(lambda document: _try(cluster, document), custom)


def test_a_wrong_field_of_each_is_refused(cluster: Cluster, defined, custom):
    for document in {_key(one): one for one in custom}.values():
        wrong = {**document, "spec": {**document["spec"], "sceleton": 1}}
        with pytest.raises(RuntimeError, match=r"unknown field \"spec.sceleton\""):
            _try(cluster, wrong)
