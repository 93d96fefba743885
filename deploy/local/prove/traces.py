"""Looking for the key after it was used: in memories, and in everything at rest."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from byokeep.testing.canary import files_with, forms, found_in

from deploy.local.prove.attack import GotThroughError, Group, NotShownError
from deploy.local.prove.attacker import Attacker
from deploy.local.topology import SERVICES

GROUP = Group("Looking for a key after a review has used it")
_ROOT = "the rights of whoever runs this; as root, every process's memory and every file"
_CHUNK = 16 * 1024 * 1024
_OVERLAP = 4096
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r")
_PEEK = Path(__file__).with_name("peek.py")


@GROUP.attack("keyvault's memory", holds=_ROOT)
def memory_of_keyvault(attacker: Attacker) -> str:
    """It opened the key twice: for validation, and for the review."""
    return _memory(attacker, "keyvault")


@GROUP.attack("the orchestrator's memory", holds=_ROOT)
def memory_of_orchestrator(attacker: Attacker) -> str:
    """It relayed the sealed key and scheduled the review."""
    return _memory(attacker, "orchestrator")


@GROUP.attack("the runner's memory, and its children's", holds=_ROOT)
def memory_of_runner(attacker: Attacker) -> str:
    """Its one-shot child had the key, and is gone."""
    return _memory(attacker, "runner")


@GROUP.attack("databases with their logs, files, output", holds=_ROOT)
def everything_at_rest(attacker: Attacker) -> str:
    """Raw, base64, hex, escaped, and every 8 characters of it."""
    customer = attacker.customer
    with attacker.stack.postgres.connect() as session:
        session.execute("CHECKPOINT")
    root = attacker.state.root
    # The key's id is in every place where the key could be: the search does find things.
    where = list(files_with(root, {"id": customer.key_id.encode()}))
    if not where:
        raise NotShownError("the search found nothing at all")
    wanted = forms(customer.key, customer.prefix)
    found = [f"{path.relative_to(root)} ({names[0]})" for path, names in files_with(root, wanted)]
    if found:
        raise GotThroughError(f"the key is in {', '.join(found)}")
    files = sum(1 for path in root.rglob("*") if path.is_file())
    return f"not in {files} files, of which {len(where)} have the key's id"


@GROUP.attack("the services' memories", holds="the services' user, without root's rights")
def memory_without_root(attacker: Attacker) -> str:
    """Another process of the same user."""
    if sys.platform != "linux":
        return "this system has no /proc/PID/mem"
    for name in SERVICES:
        pid = attacker.stack.process(name).pid
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_PEEK), str(pid)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if done.stdout.strip() != "refused":
            raise GotThroughError(f"{name}: /proc/{pid}/mem {done.stdout.strip() or 'not tried'}")
    return "the kernel refuses /proc/PID/mem of all three"


def _memory(attacker: Attacker, name: str) -> str:
    keys = (attacker.customer.key, attacker.victim.plaintext)
    if sys.platform != "linux":
        return "this system has no /proc/PID/mem"
    wanted = {
        f"{name} of key {n}": form
        for n, key in enumerate(keys, 1)
        for name, form in _wanted(key).items()
    }
    if not any(found_in(chunk, wanted) for chunk in _chunks("self")):
        raise NotShownError("the scan misses the key in this process, which holds it")
    total = 0
    processes = [attacker.stack.process(name).pid]
    processes += _descendants(processes[0])
    try:
        for pid in processes:
            for chunk in _chunks(str(pid)):
                total += len(chunk)
                if found := found_in(chunk, wanted):
                    raise GotThroughError(f"process {pid} of {name} holds it: {', '.join(found)}")
    except PermissionError:
        return "the kernel refuses /proc/PID/mem to this user"
    if not total:
        raise NotShownError(f"nothing of {name}'s memory could be read")
    count = f"{len(processes)} processes" if len(processes) > 1 else "1 process"
    return f"not in {total / 1e6:.0f} MB of {count}; found in this one, which holds it"


def _wanted(key: str) -> dict[str, bytes]:
    # Halves, so that a copy that is overwritten in part is found as well.
    half = len(key) // 2
    wanted = {"first half": key[:half].encode(), "second half": key[half:].encode()}
    coded = ("hex", "b64 at 0", "b64 at 1", "b64 at 2", "utf-16")
    return wanted | {name: form for name, form in forms(key, "").items() if name in coded}


def _chunks(pid: str) -> Iterator[bytes]:
    """Yield what a process can read of its own memory. Raises PermissionError."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for start, end in _REGION.findall(maps):
            position, last = int(start, 16), int(end, 16)
            while position < last:
                try:
                    memory.seek(position)
                    chunk = memory.read(min(_CHUNK, last - position))
                except (OSError, OverflowError, ValueError):
                    break  # the kernel's own pages, or unmapped meanwhile
                if not chunk:
                    break
                yield chunk
                # What lies across a border is found in the next one.
                position += len(chunk) - (_OVERLAP if len(chunk) == _CHUNK else 0)


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        return []
    own = [int(child) for child in children.read_text().split()]
    return [*own, *(each for child in own for each in _descendants(child))]
