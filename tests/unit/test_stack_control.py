"""The control of a stack in a container: who may command it, and what a mistake is answered."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import HTTPServer
from types import SimpleNamespace

import httpx
import pytest
from byokeep.testing.remote import Control

from deploy.local import control
from deploy.local.processes import StackError


def _log(name: str) -> str:
    if name != "runner":
        raise StackError(f"no process {name} in this stack")
    return "a line"


@pytest.fixture
def url() -> Iterator[str]:
    commands = SimpleNamespace(
        table={"log": _log, "health": lambda: {"keyvault": "SERVING", "runner": "NOT_SERVING"}}
    )
    server = HTTPServer(("127.0.0.1", 0), control._handler(commands, "right"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _said(url: str, token: str, command: str, **arguments: object) -> str:
    client = Control(url, token)
    try:
        return str(client.ask(command, **arguments))
    except RuntimeError as error:
        return str(error)
    finally:
        client.close()


def test_only_the_token_commands(url: str):
    assert _said(url, "right", "log", name="runner") == "a line"
    assert _said(url, "wrong", "log", name="runner") == "the token is another"
    assert httpx.post(f"{url}/log", json={"name": "runner"}).status_code == 403


def test_what_makes_no_sense_is_said(url: str):
    assert _said(url, "right", "log", name="nobody") == "no process nobody in this stack"
    assert "unexpected keyword argument" in _said(url, "right", "log", who="runner")
    assert _said(url, "right", "halt") == "no command halt: log, health"


def test_health_needs_no_token_and_all_services(url: str):
    answer = httpx.post(f"{url}/health")
    assert answer.status_code == 503
    assert "NOT_SERVING" in answer.json()["error"]


def test_without_a_token_nobody_commands():
    commands = SimpleNamespace(table={"log": _log})
    server = HTTPServer(("127.0.0.1", 0), control._handler(commands, ""))
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    client = http.client.HTTPConnection("127.0.0.1", server.server_port)
    # As no library of ours would send it: the blank stays.
    client.request("POST", "/log", body=b"{}", headers={"Authorization": "Bearer "})
    status = client.getresponse().status
    thread.join()
    client.close()
    server.server_close()
    assert status == 403
