"""Reviews that run while something is done to the cluster, and what became of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.kubernetes.cluster import ROOT, Cluster, soon

DIFF = (ROOT / "deploy/local/demo.diff").read_text()
_RATE = 10.0  # reviews a second

# Submits reviews at a rate until it is told to stop, or its time is over; prints how they ended.
_LOAD = """
import collections, json, os, threading, time
import byokeep

PATCH = "diff --git a/a.py b/a.py\\n--- a/a.py\\n+++ b/a.py\\n@@ -1 +1,2 @@\\n a = 1\\n+b = 2\\n"
ended, start = collections.Counter(), time.monotonic()
# A machine that is slower than the rate is not buried.
unfinished = threading.Semaphore(UNFINISHED)
with byokeep.connect("developer") as connection:
    def review():
        try:
            connection.review(PATCH, "acme/shop", head_commit=os.urandom(20).hex(), wait=240)
            ended["completed"] += 1
        except Exception as error:
            ended[f"{type(error).__name__}: {error}"] += 1
        finally:
            unfinished.release()
    threads = []
    while len(threads) < SECONDS * RATE and not os.path.exists("/tmp/stop"):
        unfinished.acquire()
        threads.append(threading.Thread(target=review))
        threads[-1].start()
        time.sleep(max(0, start + len(threads) / RATE - time.monotonic()))
    for thread in threads:
        thread.join()
print(json.dumps(ended))
"""


@contextmanager
def load(cluster: Cluster, rate: float = _RATE, unfinished: int = 24) -> Iterator[dict[str, int]]:
    """Submit reviews while the block lasts, no more than some at a time; the dict says then what
    became of them."""
    result: dict[str, int] = {}
    cluster.python("import pathlib; pathlib.Path('/tmp/stop').unlink(missing_ok=True)")
    code = _LOAD.replace("SECONDS", "800").replace("RATE", str(rate))
    code = code.replace("UNFINISHED", str(unfinished))
    process = cluster.start(*cluster.python_command(), text=code)
    try:
        yield result
    finally:
        cluster.python("import pathlib; pathlib.Path('/tmp/stop').touch()")
        output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    result |= json.loads(output)


@contextmanager
def one_review(cluster: Cluster, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A review whose provider call takes so long, once the call is open."""
    cluster.emulator("DELETE", "/calls")
    cluster.emulator("POST", "/latency", {"seconds": seconds})
    place = ["--namespace=byokeep-client", "client-0", "--", "/opt/byokeep/bin/python"]
    command = ["-m", "byokeep.cli", "--json", "review", "--repo=acme/shop", "--diff=-"]
    try:
        process = cluster.start("exec", "--stdin", *place, *command, text=DIFF)
        soon(lambda: bool(cluster.emulator("GET", "/calls")["calls"]), "no call was made")
        yield process
    finally:
        cluster.emulator("POST", "/latency", {"seconds": 0})


def last(output: str) -> dict[str, Any]:
    """Return the last of the lines of JSON in which the command tells a review."""
    review: dict[str, Any] = json.loads(output.splitlines()[-1])
    return review
