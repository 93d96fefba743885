"""The embedded PostgreSQL: two roles that can't cross, no trust, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from deploy.local.postgres import EmbeddedPostgres
from deploy.local.processes import StackError, alive, wait_for


def _refused(url: str) -> str:
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(url)
    return str(caught.value)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="byokeep-test-", dir="/tmp") as path:
        Path(path).chmod(0o711)
        yield Path(path) / "postgres"


def test_each_role_uses_its_own_database(keyvault_database_url, orchestrator_database_url) -> None:
    for url in (keyvault_database_url, orchestrator_database_url):
        with psycopg.connect(url) as session:
            session.execute("CREATE TABLE t (x int)")
            session.execute("SELECT 1 FROM t")


@pytest.mark.parametrize("zone", ["keyvault", "orchestrator"])
def test_roles_cannot_cross(zone, request, postgres, database_passwords) -> None:
    """Shown to fail without protection: with the rules of pg_hba.conf widened to `all` and
    the REVOKE left out, the foreign role connects."""
    other = {"keyvault": "orchestrator", "orchestrator": "keyvault"}[zone]
    url = request.getfixturevalue(f"{zone}_database_url")
    foreign = f"byokeep_{other}"
    name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    crossed = postgres.url(name, foreign, database_passwords[foreign])
    postgres.create_database(other, foreign, database_passwords[foreign])
    assert "no pg_hba.conf entry" in _refused(crossed)


@pytest.mark.parametrize("zone", ["keyvault", "orchestrator"])
def test_connect_is_revoked_too(zone, request, postgres) -> None:
    """The second lock: the database itself grants CONNECT to its owner alone. Shown to fail
    with the REVOKE left out."""
    url = request.getfixturevalue(f"{zone}_database_url")
    name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    with postgres.connect() as session:
        session.execute("CREATE ROLE byokeep_stranger")
        allowed = session.execute(
            "SELECT has_database_privilege('byokeep_stranger', %s, 'CONNECT')", [name]
        ).fetchone()
        session.execute("DROP ROLE byokeep_stranger")
    assert allowed == (False,)


@pytest.mark.parametrize("database", ["postgres", "template1"])
def test_roles_cannot_reach_system_databases(
    database, keyvault_database_url, postgres, database_passwords
) -> None:
    role = "byokeep_keyvault"
    assert "no pg_hba.conf entry" in _refused(
        postgres.url(database, role, database_passwords[role])
    )


@pytest.mark.parametrize("password", ["", "wrong"])
def test_trust_is_gone(password, keyvault_database_url, postgres) -> None:
    """Shown to fail with `trust` in place of `scram-sha-256`."""
    name = psycopg.conninfo.conninfo_to_dict(keyvault_database_url)["dbname"]
    message = _refused(postgres.url(name, "byokeep_keyvault", password))
    assert "password" in message


def test_nothing_but_scram_and_the_owner_is_accepted(postgres) -> None:
    with postgres.connect() as session:
        rules = session.execute("SELECT type, auth_method FROM pg_hba_file_rules").fetchall()
    assert set(rules) == {("local", "peer"), ("local", "scram-sha-256")}


def test_opens_no_port_and_keeps_audit_durable(postgres) -> None:
    with postgres.connect() as session:
        shown = [
            session.execute(f"SHOW {name}").fetchone()[0]
            for name in ("listen_addresses", "fsync", "synchronous_commit", "full_page_writes")
        ]
    assert shown == ["", "on", "on", "on"]


def test_password_is_stored_as_a_scram_verifier(postgres, keyvault_database_url) -> None:
    with postgres.connect() as session:
        row = session.execute(
            "SELECT rolpassword, rolsuper, rolcreaterole, rolcreatedb FROM pg_authid"
            " WHERE rolname = 'byokeep_keyvault'"
        ).fetchone()
    assert row[0].startswith("SCRAM-SHA-256$")
    assert row[1:] == (False, False, False)


def test_name_of_another_zone_is_refused(postgres) -> None:
    with pytest.raises(ValueError, match="is named keyvault"):
        postgres.create_database("orchestrator", "byokeep_keyvault", "x")


def test_data_outlives_a_restart(directory) -> None:
    server = EmbeddedPostgres(directory)
    with server:
        url = server.create_database("keyvault", "byokeep_keyvault", "one")
        with psycopg.connect(url) as session:
            session.execute("CREATE TABLE t AS SELECT 7 AS x")
    with server:
        url = server.create_database("keyvault", "byokeep_keyvault", "two")
        with psycopg.connect(url) as session:
            assert session.execute("SELECT x FROM t").fetchone() == (7,)


_START_AND_STAY = """
import sys, time
from pathlib import Path
from deploy.local.postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_server_dies_with_a_killed_parent(directory) -> None:
    """Shown to fail without the prctl of `launch`."""
    with subprocess.Popen(
        [sys.executable, "-c", _START_AND_STAY, str(directory)], stdout=subprocess.PIPE
    ) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    assert wait_for(lambda: not alive(pid), 60)


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder with mode 0700 and a short path: a socket's path has a limit."""
    with tempfile.TemporaryDirectory(prefix="byokeep-", dir="/tmp") as folder:
        yield Path(folder)


def test_unreachable_directory_is_named(closed) -> None:
    """Nothing above the directory is opened up for the server's system user."""
    server = EmbeddedPostgres(closed / "data")
    if os.geteuid() == 0:
        with pytest.raises(StackError, match="can't reach"):
            server.start()
    assert closed.stat().st_mode & 0o777 == 0o700


def test_too_long_a_path_is_named() -> None:
    with pytest.raises(StackError, match="too long"):
        EmbeddedPostgres(Path("/tmp") / ("x" * 100))
