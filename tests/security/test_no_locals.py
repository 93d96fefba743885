"""19. `no_locals`: an exception with a live key in its frames leaves no local in any report."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from byokeep.testing.canary import forms, found_in

from tests.harness import keyvault as kv

# A production process of a service, set up as `server.main` does, in which something breaks
# while a key is in the frames: in its own code, a thread, a task nobody waits for, a callback of
# the loop, a destructor, a warning, and at the very top.
_PROGRAM = """
import asyncio, gc, logging, sys, threading, warnings
sys.path[:0] = {path!r}
from services.common import hardening, logs
from services.keyvault import envelope
hardening.close_the_door()
logs.setup("keyvault", "debug")
logs.catch_all()

def broken(cipher, *arguments):
    key = sys.stdin.readline().strip() if not KEY else KEY[0]
    KEY[:] = [key]
    data_key = bytearray(key.encode())
    raise RuntimeError(f"a library's text with {{key}} and {{data_key}}")

KEY = []
real = envelope.hmac.compare_digest
class Broken:
    compare_digest = staticmethod(lambda *a: broken(*a))
envelope.hmac = Broken

def opened():
    context = envelope.Context("test", "acme", "", "openai", "key_1", 1)
    plaintext = KEY[0] if KEY else ""
    return envelope.decrypt(bytearray(32), envelope.MAGIC + bytes(100), context)

class Fragile:
    def __del__(self):
        opened()

async def main():
    loop = asyncio.get_running_loop()
    loop.set_debug({debug})
    try:
        opened()
    except RuntimeError as error:
        logs.failure(logging.getLogger("services.x"), "caught", error)
        logging.getLogger("services.x").exception("said with %s", error)
        logging.getLogger("a.library").error("it broke: %r", error, exc_info=True)
    async def task():
        opened()
    forgotten = asyncio.ensure_future(task())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del forgotten
    gc.collect()
    loop.call_soon(opened)
    loop.call_soon(broken, KEY[0])
    thread = threading.Thread(target=opened)
    thread.start()
    thread.join()
    Fragile()
    warnings.warn(f"with {{KEY[0]}}")
    await asyncio.sleep(0.05)

import uvloop
uvloop.run(main()) if {loop!r} == "uvloop" else asyncio.run(main())
opened()
"""


REPORTS = ("caught", "said with %s", "it broke: %r", "unhandled", "warning")
REPORTS += ("thread_died", "unraisable", "died")


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("debug", [False, True])
def test_no_locals(loop, debug):
    """No form of the key, and no text of the exception, in anything that such a process writes.

    Shown to fail: without `logs.catch_all` (Python's own hooks print the exception's text), and
    with `tb_locals` or the text in `logs.describe`.
    """
    program = _PROGRAM.format(path=[os.getcwd(), *sys.path], loop=loop, debug=debug)
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=f"{kv.PROVIDER_KEY}\n".encode(),
        env={"PATH": os.environ["PATH"], "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert found_in(said, forms(kv.PROVIDER_KEY, "sk-proj-")) == [], said.decode()
    # It was reported all the same: what broke, and where.
    for report in (
        "caught",
        "said with %s",
        "it broke: %r",
        "unhandled",
        "thread_died",
        "unraisable",
        "died",
    ):
        assert f'"event": "{report}"'.encode() in said, (report, said.decode())
    assert said.count(b"RuntimeError") >= 7, said.decode()


_WIRED = """
import sys, threading
sys.path[:0] = {path!r}
from services.common import hardening, server
def make():
    print(sys.excepthook is sys.__excepthook__, threading.excepthook is threading.__excepthook__)
    raise server.ConfigError("stop here")
class Settings:
    log_level = "info"
server.main("keyvault", Settings(), make)
"""


def test_no_locals_is_set_up_by_every_service():
    """`server.main` does as the program above does, before the app is made."""
    done = subprocess.run(
        [sys.executable, "-c", _WIRED.format(path=[os.getcwd(), *sys.path])],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "False False\n", done.stderr


def test_no_locals_in_the_one_shot_process_of_intake():
    """An order that breaks it: what it says goes to keyvault's log.

    Shown to fail: without catch_all in intake_child.main.
    """
    done = subprocess.run(
        [sys.executable, "-m", "services.keyvault.intake_child"],
        input=f'{{"{kv.PROVIDER_KEY}": 1}}\n{kv.PROVIDER_KEY}'.encode(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert b'"event": "died", "error": "builtins.KeyError"' in done.stderr.replace(
        b'"service": "keyvault.intake", ', b""
    )
    assert b"Traceback" not in done.stderr
    assert found_in(done.stdout + done.stderr, forms(kv.PROVIDER_KEY, "sk-proj-")) == []


def test_no_locals_in_the_commands_tracebacks():
    """The command's tracebacks: typer would let rich print every frame's locals.

    Shown to fail: without pretty_exceptions_enable=False.
    """
    from byokeep.cli.app import app

    assert app.pretty_exceptions_enable is False
