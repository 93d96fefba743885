"""Definitions of others' custom resources, out of their Go modules. Pinned: a module whose hash is
another is not used."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Definition:
    """Where a CustomResourceDefinition is: a module with its go.sum hash, and a path in it."""

    module: str
    sum: str
    path: str


#: By API group and kind.
DEFINITIONS: Mapping[tuple[str, str], Definition] = {
    ("cert-manager.io", "Certificate"): Definition(
        "github.com/cert-manager/cert-manager@v1.21.0",
        "h1:BCoB2BxA1lbqPusZCqPLPn8Q9MhraL7RbZGHbBcm3W8=",
        "deploy/crds/cert-manager.io_certificates.yaml",
    ),
    ("keda.sh", "ScaledObject"): Definition(
        "github.com/kedacore/keda/v2@v2.21.0",
        "h1:R6z2HZvstK4RLUMxroNACzBj74xGxt3kG59b5Xc+Xps=",
        "config/crd/bases/keda.sh_scaledobjects.yaml",
    ),
    ("cilium.io", "CiliumNetworkPolicy"): Definition(
        "github.com/cilium/cilium@v1.19.0",
        "h1:hfPhb9TcoG3fRMA1/ExBFihEX1NpEWcUaV1jXJTkQVo=",
        "pkg/k8s/apis/cilium.io/client/crds/v2/ciliumnetworkpolicies.yaml",
    ),
}


def file(definition: Definition) -> Path:
    """Return the file of a definition. Raises RuntimeError where the module can't be had."""
    done = subprocess.run(
        ["go", "mod", "download", "-json", definition.module],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "GOFLAGS": "-mod=mod"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"{definition.module}: {done.stdout}{done.stderr}")
    found = json.loads(done.stdout)
    if found["Sum"] != definition.sum:
        raise RuntimeError(f"{definition.module} is not what it was: {found['Sum']}")
    return Path(found["Dir"]) / definition.path
