"""A stack that stays: `up`, `down`, `status` and `clean`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.local import material
from deploy.local.binaries import erase_copy
from deploy.local.processes import StackError, alive, wait_for
from deploy.local.state import CHECKOUT, State, existing_state, open_state
from deploy.local.supervisor import LocalStack
from deploy.local.topology import SERVICES

_STOP_SECONDS = 40.0
# Where the `byokeep` of this checkout's .venv looks.
CHECKOUT_CONFIG = CHECKOUT / ".byokeep" / "config.toml"


def show(name: str, what: str, seconds: float) -> None:
    """Print one line of progress."""
    print(f"  {name:<14}{what:<34}{seconds:5.1f} s", flush=True)


def up(root: Path, config: Path, *, live: bool, ports: Mapping[str, int]) -> int:
    """Start a stack in the background; return once it serves. Raises StackError."""
    fresh = existing_state(root) is None
    state = open_state(root)
    holder = state.holder()
    if holder is not None:
        description = _description(state)
        if description is None or description["pid"] != holder:
            raise StackError(f"a stack is starting in {root}: try again")
        print(f"already up in {root}")
        listens = description["ports"]
        addresses = (f"127.0.0.1:{listens[name]}" for name in ("orchestrator", "keyvault"))
        material.write_profiles(config, state, *addresses)
        _print_usage(config, description, fresh=False)
        return 0
    command = [sys.executable, "-m", "deploy.local", "up", "--foreground"]
    command += [f"--state={root}", f"--config={config}"]
    command += ["--live"] if live else []
    command += [f"--port={name}={number}" for name, number in ports.items()]
    supervisor = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        # Its output ends when it has moved to its log: the stack is up, or has failed.
        for line in supervisor.stdout or ():
            print(line, end="", flush=True)
    except KeyboardInterrupt:
        supervisor.terminate()
        supervisor.wait(_STOP_SECONDS)
        raise
    if not wait_for(lambda: _describes(state, supervisor.pid), 1.0):
        return supervisor.wait(_STOP_SECONDS) or 1
    description = _description(state)
    assert description is not None  # noqa: S101 - it was there a moment ago
    _print_usage(config, description, fresh=fresh)
    return 0


def serve(root: Path, config: Path, *, live: bool, ports: Mapping[str, int]) -> int:
    """Be the supervisor of a stack until a signal comes. Raises StackError."""
    state = open_state(root)
    lock = state.lock()
    if lock is None:
        raise StackError(f"another supervisor (process {state.holder()}) keeps {root} up")
    stack = LocalStack(state, live=live, report=show, ports=ports)
    stack.start()
    try:
        orchestrator, keyvault = (stack.topology.address(n) for n in ("orchestrator", "keyvault"))
        material.write_profiles(config, state, orchestrator, keyvault)
        if not sys.stdout.isatty():
            _move_output(state.logs / "supervisor.log")
        stack.watch()
    except KeyboardInterrupt:
        return 0
    finally:
        stack.stop()
        os.close(lock)
    return 0


def down(root: Path) -> int:
    """Stop a running stack. Raises StackError if it doesn't end."""
    if _stop(root):
        print(f"stopped; data and keys stay in {root}")
    else:
        print(f"nothing runs in {root}")
    return 0


def _stop(root: Path) -> bool:
    """Stop a stack; say whether one ran."""
    state = existing_state(root)
    holder = None if state is None else state.holder()
    if state is None or holder is None:
        return False
    os.kill(holder, signal.SIGTERM)
    if not wait_for(lambda: not alive(holder), _STOP_SECONDS):
        os.kill(holder, signal.SIGKILL)  # the kernel then ends its children
        if not wait_for(lambda: not alive(holder), 5.0):
            raise StackError(f"the supervisor (process {holder}) does not end")
    return True


def status(root: Path) -> int:
    """Print what runs and serves; 0 if all does, 3 if nothing is up, 1 otherwise."""
    state = existing_state(root)
    if state is None or state.holder() is None:
        print(f"down ({root})")
        return 3
    description = _description(state)
    if description is None:
        print(f"starting ({root})")
        return 1
    print(f"up in {root}, supervisor {description['pid']}")
    healthy = True
    for name, pid in description["processes"].items():
        what = health(name, pid, description["ports"])
        healthy &= what in ("SERVING", "running")
        print(f"  {name:<14}{what:<14} process {pid}")
    return 0 if healthy else 1


def clean(root: Path, config: Path) -> int:
    """Stop a stack and erase its folder and the profile that `up` wrote."""
    if existing_state(root) is not None:
        ran = _stop(root)
        State(root).erase()
        print(f"{'stopped, and ' if ran else ''}erased {root}")
    erase_copy()
    config.unlink(missing_ok=True)
    return 0


def _describes(state: State, pid: int) -> bool:
    description = _description(state)
    return description is not None and description["pid"] == pid


def _description(state: State) -> dict[str, Any] | None:
    try:
        description: dict[str, Any] = json.loads(state.description.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return description


def health(name: str, pid: int, ports: Mapping[str, int]) -> str:
    """What a process of the stack says of itself: `ended`, `running`, or gRPC health."""
    if not alive(pid):
        return "ended"
    if name not in SERVICES:
        return "running"
    # Imported here: the other commands needn't load grpc first.
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    address, direct = f"127.0.0.1:{ports[f'{name}-health']}", [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=direct) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=2.0
            )
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _print_usage(config: Path, description: Mapping[str, Any], *, fresh: bool) -> None:
    command = shlex.quote(str(_shortest(Path(sys.prefix) / "bin" / "byokeep")))
    quoted = shlex.quote(str(config))
    found = "; this checkout's command finds it by itself" if config == CHECKOUT_CONFIG else ""
    print(f"\ntenant `{material.TENANT}` is ready{found}:")
    if not found:
        print(f"  export BYOKEEP_CONFIG={quoted}")
    print(f"  {command} key {'add openai' if fresh else 'list'}")
    if description["live"]:
        print("calls go to the real providers: keys are real and cost money")
    else:
        print("an emulator plays the providers, and takes any made-up key of the right form:")
        print("  for openai, `sk-proj-` and 40 letters")
        print(f"  its control: http://127.0.0.1:{description['emulator'][1]}")
    print("profile demo has every role; --profile submitter, key-admin, auditor or operator, one")
    if found:
        print("any other command needs to be told:")
        print(f"  export BYOKEEP_CONFIG={quoted}")


def _shortest(path: Path) -> Path:
    return path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else path


def _move_output(log: Path) -> None:
    sys.stdout.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
