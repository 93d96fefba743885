"""The edges between zones and tenants, and what must not start or be typed."""

from __future__ import annotations

import os
import subprocess
import sys

import psycopg
from byokeep.ids import new_id
from byokeep.names import tenant_name
from byokeep.orchestrator.v1 import key_pb2, tenant_pb2

from deploy.local.prove.attack import GotThroughError, Group, NotShownError, refused
from deploy.local.prove.attacker import Attacker, fresh_key
from deploy.local.state import CHECKOUT
from deploy.local.topology import SERVICES

GROUP = Group("Edges between zones and tenants")
_START_SECONDS = 60.0


@GROUP.attack("keyvault's database", holds="the orchestrator's database role and password")
def database_of_the_other_zone(attacker: Attacker) -> str:
    """One server, two databases, two roles."""
    url = attacker.stack.database_url("orchestrator")
    before, _, after = url.partition("/orchestrator?")
    if not after:
        raise NotShownError("the URL of the orchestrator's database has another form")
    with psycopg.connect(url, connect_timeout=10):
        pass  # the password is right
    try:
        session = psycopg.connect(f"{before}/keyvault?{after}", connect_timeout=10)
    except psycopg.OperationalError as error:
        if "pg_hba.conf" not in str(error) and "permission denied" not in str(error):
            raise
        return "PostgreSQL has no rule that lets this role in"
    session.close()
    raise GotThroughError("the orchestrator's role has a session in keyvault's database")


@GROUP.attack("another tenant's keys", holds="a key-admin's certificate of tenant demo")
def keys_of_another_tenant(attacker: Attacker) -> str:
    """Asked of the orchestrator, as its own clients do."""
    tenant = attacker.new_tenant()
    with attacker.connect("operator") as operator:
        operator.tenants.CreateTenant(
            tenant_pb2.CreateTenantRequest(name=tenant_name(tenant), request_id=new_id("req"))
        )
    with attacker.connect("key-admin") as connection:
        connection.keys.ListKeys(key_pb2.ListKeysRequest(parent=connection.parent))
        request = key_pb2.ListKeysRequest(parent=tenant_name(tenant))
        return refused(lambda: connection.keys.ListKeys(request), "TENANT_NOT_ALLOWED")


@GROUP.attack("a key as an argument of the command", holds="the shell's history, the process list")
def key_as_an_argument(attacker: Attacker) -> str:
    """Typed by mistake: refused before anything is done, and not shown again."""
    key = fresh_key()
    done = subprocess.run(
        [sys.executable, "-m", "byokeep.cli", "key", "add", "openai", key],
        env={**os.environ, "BYOKEEP_CONFIG": str(attacker.state.config)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_START_SECONDS,
        check=False,
    )
    said = done.stdout + done.stderr
    if key in said:
        raise GotThroughError("the command shows the key that it was given")
    if done.returncode != 2 or "KEY_IN_ARGUMENTS" not in said:
        raise GotThroughError(f"not refused as a key; the command ends with {done.returncode}")
    return "exit code 2, KEY_IN_ARGUMENTS, nothing of it shown"


@GROUP.attack("start the services with GRPC_TRACE=all", holds="the services' environment")
def started_with_grpc_trace(attacker: Attacker) -> str:
    """gRPC would print every payload before TLS."""
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", package, "serve"],
            env=attacker.stack.topology.environment(name) | {"GRPC_TRACE": "all"},
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, package in SERVICES.items()
    }
    try:
        for name, process in started.items():
            said, _ = process.communicate(timeout=_START_SECONDS)
            if process.returncode == 0 or "GRPC_TRACE is set" not in said:
                raise GotThroughError(f"{name} did not refuse: exit code {process.returncode}")
    except subprocess.TimeoutExpired as late:
        raise GotThroughError(f"a service runs with GRPC_TRACE: {late.cmd[2]}") from None
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    return f"{len(started)} of {len(SERVICES)} refuse to start"
