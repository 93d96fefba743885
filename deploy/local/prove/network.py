"""The way out: providers that redirect, addresses that lead elsewhere."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
from byokeep.common.v1 import options_pb2
from byokeep.ids import new_id
from byokeep.names import provider_value
from byokeep.orchestrator.v1 import review_pb2

from deploy.local.material import PROVIDER_HOSTS, TRUST_DOMAIN, make_authorities
from deploy.local.pki import CertificateAuthority, Identity
from deploy.local.processes import wait_for
from deploy.local.prove.attack import GotThroughError, Group, NotShownError
from deploy.local.prove.attacker import Attacker
from deploy.local.prove.hostile import listening

if TYPE_CHECKING:
    from services.llm_runner.sockets import Dialer

GROUP = Group("The way out: to a provider, and nowhere else")
_NETWORK = "the network: the provider's name leads to his own server"
_REACHED_SECONDS = 45.0


@GROUP.attack("a provider that redirects the call", holds="the provider's answers")
def provider_redirects(attacker: Attacker) -> str:
    """To another provider's host, which the runner could reach as well."""
    customer = attacker.customer
    since = max((call.sequence for call in attacker.emulator.calls()), default=0)
    attacker.emulator.fault(
        "redirect", provider="openai", path="chat", location="https://api.anthropic.com/v1/models"
    )
    try:
        review = customer.review(attacker.connect)
    finally:
        attacker.emulator.clear_faults()
    calls = attacker.emulator.calls(since)
    others = [call.provider for call in calls if call.provider != "openai"]
    if others or review.failure != review_pb2.FAILURE_REASON_BAD_RESPONSE:
        raise GotThroughError(f"followed to {others or 'an answer that was taken'}")
    return f"not followed: {len(calls)} call to openai, none elsewhere; review FAILED BAD_RESPONSE"


@GROUP.attack("the child asks for another host", holds="a child's channel to its parent")
def child_dials_elsewhere(attacker: Attacker) -> str:
    """Asked of the parent's dialler, in this process; only it can open a socket."""
    del attacker
    # Loaded here: nothing else of deploy/ needs a service's code.
    from services.llm_runner.sockets import Dialer

    asked = ("evil.example:443", "api.anthropic.com:443", "api.openai.com:80", "127.0.0.1:443")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = listener.getsockname()[:2]
        dialer = Dialer(dict.fromkeys([*PROVIDER_HOSTS, "evil.example", "127.0.0.1"], here))
        openai = provider_value("openai")
        for one in asked:
            if asyncio.run(_dials(dialer, openai, one)):
                raise GotThroughError(f"the parent connected a child of openai to {one}")
        if not asyncio.run(_dials(dialer, openai, "api.openai.com:443")):
            raise NotShownError("the parent connects to nothing")
    return f"the parent refuses {', '.join(asked[:2])} and {len(asked) - 2} more"


async def _dials(dialer: Dialer, provider: options_pb2.Provider.ValueType, asked: str) -> bool:
    connected = await dialer.dial(provider, asked)
    if isinstance(connected, int):
        return False
    connected.close()
    return True


@GROUP.attack("a server with the provider's name, of another CA", holds=_NETWORK, disruptive=True)
def server_of_another_ca(attacker: Attacker) -> str:
    """The name is right; nobody whom the child trusts says so."""
    stranger = CertificateAuthority.new(TRUST_DOMAIN)
    return _led_to(attacker, stranger.issue(attacker.loot("provider"), dns=PROVIDER_HOSTS))


@GROUP.attack(
    "a server with a genuine certificate, of another name", holds=_NETWORK, disruptive=True
)
def server_of_another_name(attacker: Attacker) -> str:
    """Signed by the CA that the child trusts, for a host that is his."""
    _, genuine = make_authorities(attacker.state)
    return _led_to(attacker, genuine.issue(attacker.loot("elsewhere"), dns=["evil.example"]))


def _led_to(attacker: Attacker, leaf: Identity) -> str:
    """Take the provider's address over, and have a review call there."""
    customer = attacker.customer
    ports = attacker.stack.emulator_ports
    if ports is None:
        raise RuntimeError("this stack has no emulator")
    attacker.stack.process("emulator").kill()
    with listening(leaf, ports[0]) as seen, attacker.connect() as connection:
        review = customer.submit(connection)
        reached = wait_for(lambda: bool(seen.refusals or seen.requests), _REACHED_SECONDS)
        with suppress(grpc.RpcError):  # it may have ended
            connection.reviews.CancelReview(
                review_pb2.CancelReviewRequest(name=review.name, request_id=new_id("req"))
            )
    if seen.requests:
        held = "with" if customer.key.encode() in b"".join(seen.requests) else "without"
        raise GotThroughError(f"his server was sent a request, {held} the key")
    if not reached:
        raise NotShownError("no child came to the attacker's server")
    return f"the child ends TLS ({seen.refusals[0]}); no byte of a request"
