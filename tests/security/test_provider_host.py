"""`provider_host` (34): fixed hosts, no redirect followed, the key in a header only. And the
runner's part of `cross_socket` (51): TLS refuses a socket to another host.
"""

from __future__ import annotations

import socket

import pytest
from byokeep.names import provider_value
from byokeep.orchestrator.v1 import key_pb2, review_pb2

from deploy.local.pki import CertificateAuthority
from deploy.local.processes import wait_for
from deploy.local.prove.hostile import listening
from services.llm_runner.providers import ADAPTERS
from services.llm_runner.sockets import HOSTS, Dialer, parse_overrides
from tests.component.runner.harness import KEYS, running_bench

# Of the shape of all three.
UNAUTHORIZED = (
    b'{"type": "error", "error": {"type": "authentication_error", "code": 401, "status": "x",'
    b' "message": "no"}}'
)


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory):
    with running_bench(tmp_path_factory.mktemp("runner")) as bench:
        yield bench


@pytest.fixture
def bench(shared_bench):
    return shared_bench.as_new()


def test_the_parent_and_the_adapters_know_the_same_hosts():
    adapters = {provider_value(name): adapter.host for name, adapter in ADAPTERS.items()}

    assert adapters == HOSTS


@pytest.mark.parametrize(
    "asked",
    [
        "api.anthropic.com:443",
        "evil.example:443",
        "api.openai.com:80",
        "api.openai.com.evil.example:443",
        "127.0.0.1:443",
        "api.openai.com",
        "",
    ],
)
async def test_the_parent_dials_the_assigned_provider_alone(asked):
    """Fails without the comparison in Dialer.dial."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        here = listener.getsockname()
        dialer = Dialer(dict.fromkeys([*HOSTS.values(), asked.partition(":")[0]], here))
        openai = provider_value("openai")

        assert await dialer.dial(openai, asked) == key_pb2.UNREACHABLE_CAUSE_UNSPECIFIED
        allowed = await dialer.dial(openai, "api.openai.com:443")
        assert isinstance(allowed, socket.socket)
        with allowed:
            assert allowed.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.parametrize(
    ("address", "cause"), [("no-such-host.invalid", "NAME_RESOLUTION"), ("127.0.0.1", "CONNECT")]
)
async def test_the_parent_says_what_was_unreachable(address, cause):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    dialer = Dialer({"api.openai.com": (address, port)})

    said = await dialer.dial(provider_value("openai"), "api.openai.com:443")

    assert key_pb2.UnreachableCause.Name(said) == f"UNREACHABLE_CAUSE_{cause}"


@pytest.mark.parametrize("text", ["evil.example=127.0.0.1:1", "api.openai.com", "api.openai.com=1"])
def test_a_dial_setting_names_known_hosts_only(text):
    with pytest.raises(ValueError, match="host=ip:port expected"):
        parse_overrides(text)


@pytest.mark.parametrize("provider", list(KEYS))
def test_no_redirect_is_followed(bench, provider):
    """Fails with a child that follows one, and a parent that dials whatever is asked."""
    for other in ADAPTERS.values():
        bench.emulator.control.fault(
            "redirect", provider=provider, location=f"https://{other.host}/v1/models"
        )
        attempt = bench.review(provider)
        assert attempt.finish().failure == review_pb2.FAILURE_REASON_BAD_RESPONSE

    calls = bench.emulator.control.calls()
    assert [call.provider for call in calls] == [provider] * len(ADAPTERS)
    assert {call.kind for call in calls} == {"chat"}


@pytest.mark.parametrize("right", [True, False])
def test_tls_is_for_the_providers_name_and_the_key_is_in_a_header(tmp_path, right):
    """A socket to a host with another provider's certificate gets no byte of the request.
    Fails (right=False) with check_hostname off in wire.tls_context."""
    ca = CertificateAuthority.new("providers.test")
    (tmp_path / "provider-ca.pem").write_text(ca.pem)
    names = list(HOSTS.values()) if right else ["api.mistaken.example"]
    leaf = ca.issue(tmp_path / "provider", dns=names)
    with (
        listening(
            leaf,
            answer=b"HTTP/1.1 401 No\r\ncontent-length: %d\r\n\r\n%s"
            % (len(UNAUTHORIZED), UNAUTHORIZED),
        ) as seen,
        running_bench(
            tmp_path,
            BYOKEEP_PROVIDER_CA=str(tmp_path / "provider-ca.pem"),
            BYOKEEP_PROVIDER_DIAL=" ".join(
                f"{one}=127.0.0.1:{seen.port}" for one in HOSTS.values()
            ),
        ) as bench,
    ):
        for provider, key in KEYS.items():
            attempt = bench.validation(provider)
            attempt.finish()
            (result,) = attempt.of("validation_result")
            assert (result.verdict == key_pb2.VALIDATION_VERDICT_INVALID) is right
            tls, nothing = key_pb2.UNREACHABLE_CAUSE_TLS, key_pb2.UNREACHABLE_CAUSE_UNSPECIFIED
            assert result.unreachable_cause == (nothing if right else tls)
            if not right:
                assert wait_for(lambda: bool(seen.refusals), 30)
                seen.refusals.clear()
                assert not seen.requests
                continue
            request = seen.requests.pop()
            line, separator, headers = request.partition(b"\r\n")
            assert key.encode() not in line
            assert headers.count(key.encode()) == 1
            host = f"\r\nhost: {ADAPTERS[provider].host}\r\n".encode()
            assert host in (separator + headers).lower()
