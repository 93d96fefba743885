"""30, and beside it: what a service refuses to start with."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.common import config
from services.common.config import ConfigError
from services.common.tls import ServerIdentity
from tests.harness import keyvault as kv

LEAKS = [
    {"GRPC_TRACE": "all"},
    {"GRPC_TRACE": "http"},
    {"GRPC_VERBOSITY": "DEBUG"},
    {"GRPC_VERBOSITY": "debug"},
    {"SSLKEYLOGFILE": "/tmp/keys"},
    {"LD_PRELOAD": "/tmp/spy.so"},
    {"LD_AUDIT": "/tmp/spy.so"},
    {"PYTHONINSPECT": "1"},
    {"PYTHONASYNCIODEBUG": "1"},
    {"PYTHONDEVMODE": "1"},
]
ZONES = ("keyvault", "orchestrator", "llm_runner")


@pytest.mark.parametrize("environ", LEAKS, ids=lambda one: "=".join(*one.items()))
def test_env_guard(environ):
    """30. Nothing starts where a library would print or write what the process keeps to itself.

    Shown to fail: with check_environment returning early.
    """
    (name,) = environ
    with pytest.raises(ConfigError, match=name):
        config.check_environment(environ)


def _start(zone: str, *options: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-m", f"services.{zone}", "serve"],
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("name", ["GRPC_TRACE", "SSLKEYLOGFILE"])
def test_env_guard_processes(zone, name, tmp_path):
    """30. And each process really refuses, whatever else is configured."""
    assert f"{name} is set" in _start(zone, **{name: str(tmp_path / "all")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("zone", ZONES)
def test_guard_developers_mode(zone):
    """Shown to fail: without the look at sys.flags."""
    assert "-X dev" in _start(zone, "-X", "dev")


_TRACED = """
import ctypes, sys
sys.path[:0] = {path!r}
if ctypes.CDLL(None).ptrace(0, 0, 0, 0) != 0: sys.exit("no ptrace here")
from services.common import config
try:
    config.check_environment({{}})
except config.ConfigError as error:
    print(error)
"""


def test_guard_tracer():
    """A debugger or tracer that is attached before the door is closed.

    Shown to fail: without `_traced`.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _TRACED.format(path=sys.path)], stdout=subprocess.PIPE, text=True
    )
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    # PTRACE_TRACEME makes us its tracer; every signal stops it until we let it go on.
    while True:
        _, status = os.waitpid(process.pid, 0)
        if not os.WIFSTOPPED(status):
            break
        number = os.WSTOPSIG(status)
        libc.ptrace(7, process.pid, 0, 0 if number == signal.SIGTRAP else number)  # PTRACE_CONT
    process.returncode = 0
    with process:
        assert "a debugger or tracer is attached" in process.stdout.read()


def test_guard_tracer_is_read_from_the_kernel(tmp_path):
    status = tmp_path / "status"
    for text, traced in (("TracerPid:\t0\n", False), ("TracerPid:\t7\n", True), ("", False)):
        status.write_text("Name:\tx\n" + text)
        assert config._traced(status) is traced
    assert config._traced(Path("/nowhere")) is False


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_guard_tls_key_that_others_read(tmp_path, mode):
    """Shown to fail: without the look at the mode in TlsFiles.load."""
    ca = kv.CertificateAuthority.new("t")
    ca.write(tmp_path / "ca")
    ca.issue(tmp_path / "s", spiffe_id="keyvault", dns=[kv.NAME])
    files = kv.transport.TlsFiles(tmp_path / "s.pem", tmp_path / "s.key", tmp_path / "ca.pem")
    ServerIdentity(files)
    files.key.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        ServerIdentity(files)


@pytest.mark.parametrize("broken", ["certificate", "key", "ca", "missing", "mismatch"])
def test_guard_tls_files(tmp_path, broken):
    """Files that are no identity are said by name or kind, and not shown."""
    ca = kv.CertificateAuthority.new("t")
    ca.write(tmp_path / "ca")
    for name in ("s", "other"):
        ca.issue(tmp_path / name, spiffe_id="keyvault", dns=[kv.NAME])
    files = kv.transport.TlsFiles(tmp_path / "s.pem", tmp_path / "s.key", tmp_path / "ca.pem")
    if broken == "missing":
        files.key.unlink()
    elif broken == "mismatch":
        files.key.write_bytes((tmp_path / "other.key").read_bytes())
    else:
        path = getattr(files, broken)
        path.write_text("CANARY-not-pem")
    with pytest.raises(ConfigError, match="BYOKEEP_TLS_KEY") as caught:
        ServerIdentity(files)
    assert "CANARY" not in str(caught.value)
    assert caught.value.__cause__ is None
