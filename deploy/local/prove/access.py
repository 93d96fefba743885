"""What the attacker holds: every certificate, signing key and password of the stack.

No real one has so much. Each attack says which part of it is used, so that what stops
it is not that something was missing.
"""

from __future__ import annotations

import contextlib
import io
import os
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from byokeep.client import Connection, connect
from byokeep.keyvault.v1 import (
    admin_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    custody_pb2_grpc,
    lease_pb2_grpc,
)
from byokeep.testing.emulator import Emulator
from byokeep.transport import channel_options
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.local.material import ROLES, SERVER_NAMES, make_grant_key
from deploy.local.pki import Identity
from deploy.local.supervisor import LocalStack

SECONDS = 30.0


class Access:
    """Speaks to a stack as anyone, and writes to its databases. A context manager."""

    def __init__(self, stack: LocalStack) -> None:
        """Attack a stack that serves."""
        self.stack = stack
        self.state = stack.state
        self._resources = ExitStack()
        self._channels: dict[Path | None, grpc.Channel] = {}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close what was opened."""
        self.hang_up()
        self._resources.close()

    # Identities and channels

    def loot(self, name: str) -> Path:
        """Return a path in the attacker's own folder, below the stack's."""
        folder = self.state.run / "attacker"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / name

    def identity(self, name: str) -> Identity:
        """The certificate of a service, or of a client's role."""
        return Identity.at((self.state.client if name in ROLES else self.state.pki) / name)

    @cached_property
    def grant_key(self) -> Ed25519PrivateKey:
        """The orchestrator's grant signing key."""
        pem = make_grant_key(self.state).read_bytes()
        key = serialization.load_pem_private_key(pem, None)
        if not isinstance(key, Ed25519PrivateKey):
            raise TypeError("the grant signing key is not Ed25519")
        return key

    def keyvault(self, identity: Identity | None) -> grpc.Channel:
        """Return a channel to keyvault; None presents no certificate."""
        key = identity.certificate if identity else None
        if key not in self._channels:
            credentials = grpc.ssl_channel_credentials(
                (self.state.pki / "ca.pem").read_bytes(),
                identity.key.read_bytes() if identity else None,
                identity.certificate.read_bytes() if identity else None,
            )
            options = channel_options(SERVER_NAMES["keyvault"])
            address = self.stack.topology.address("keyvault")
            self._channels[key] = grpc.secure_channel(address, credentials, options=options)
        return self._channels[key]

    def hang_up(self) -> None:
        """Close the channels: what is called next connects anew."""
        while self._channels:
            self._channels.popitem()[1].close()

    def leases(self, identity: Identity | None) -> lease_pb2_grpc.LeaseServiceStub:
        """keyvault's leases, as somebody."""
        return lease_pb2_grpc.LeaseServiceStub(self.keyvault(identity))

    @property
    def custody(self) -> custody_pb2_grpc.CustodyServiceStub:
        """keyvault's custody, as the orchestrator."""
        return custody_pb2_grpc.CustodyServiceStub(self.keyvault(self.identity("orchestrator")))

    @property
    def admin(self) -> admin_pb2_grpc.AdminServiceStub:
        """keyvault's administration, as the operator."""
        return admin_pb2_grpc.AdminServiceStub(self.keyvault(self.identity("operator")))

    def connect(self, role: str = "developer") -> Connection:
        """Connect as a client of a role. The caller closes it."""
        profile = "demo" if role == "developer" else role
        return connect(profile, config=self.state.config)

    @cached_property
    def emulator(self) -> Emulator:
        """The control of what plays the providers."""
        ports = self.stack.emulator_ports
        if ports is None:
            raise RuntimeError("this stack has no emulator")
        return self._resources.enter_context(Emulator(f"http://127.0.0.1:{ports[1]}"))

    # Databases, audit, the command

    def sql(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run a statement on keyvault's database as PostgreSQL's superuser."""
        with self.stack.postgres.connect("keyvault") as session:
            cursor = session.execute(statement.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def events(self, chain: str, key_id: str = "") -> list[audit_pb2.AuditEvent]:
        """Return a chain's events, as the auditor."""
        stub = audit_pb2_grpc.AuditServiceStub(self.keyvault(self.identity("auditor")))
        request = audit_pb2.ListEventsRequest(parent=chain, key_id=key_id, page_size=1000)
        return list(stub.ListEvents(request, timeout=SECONDS).events)

    def byokeep(self, *line: str) -> tuple[int, str]:
        """Run the command in this process; return its exit code and all that it said."""
        from byokeep.cli.app import run

        os.environ["BYOKEEP_CONFIG"] = str(self.state.config)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = run(line)
        return status, said.getvalue()
