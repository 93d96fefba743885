"""`python -m tests.bench [--seconds S]`: measure, write build/bench/results.json, print a table."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from byokeep.testing import Stack

from tests.bench import audit, backlog, idle, leases, reviews, rewrap, scale, stall, vault
from tests.bench.results import Row, show, write

# What a lease costs is measured at more leases a minute than one key may have. Reviews are
# measured with the settings that users get.
UNCAPPED = {
    "keyvault": {
        **{
            f"BYOKEEP_{whose}_LEASES_{what}": "0"
            for whose in ("TENANT", "KEY")
            for what in ("IN_FLIGHT", "PER_MINUTE", "PER_DAY")
        },
        "BYOKEEP_INTAKE_PER_HOUR": "1000",
    },
    "orchestrator": {"BYOKEEP_INTAKE_PER_HOUR": "1000"},
}


def _warm() -> Row:
    start = time.perf_counter()
    subprocess.run(["make", "-s", "run"], check=True, stdout=subprocess.DEVNULL, timeout=300)
    return Row("run_warm_s", time.perf_counter() - start, "s")


def _stolen(before: Any) -> Row:
    """What a virtual machine's host gave to others meanwhile: no figure here is better for it."""
    after = psutil.cpu_times()
    passed = sum(after) - sum(before)
    return Row("stolen_percent", (after.steal - before.steal) / passed * 100, "%")


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    seconds = float(os.environ.get("BENCH_SECONDS") or 15)
    parser.add_argument("--seconds", type=float, default=seconds, help="of each measurement")
    parser.add_argument("--out", type=Path, default=Path("build/bench/results.json"))
    arguments = parser.parse_args()
    rows: list[Row] = []
    load_before, before = os.getloadavg()[0], psutil.cpu_times()
    with Stack(in_memory=False) as stack:
        print("measuring idle memory, reviews …", file=sys.stderr)
        rows += idle.run(stack)
        rows += reviews.run(stack, arguments.seconds)
        rows += backlog.run(stack, arguments.seconds)
        rows.append(stall.run(stack, arguments.seconds))
    with Stack(environment=UNCAPPED, in_memory=False) as stack:
        print("measuring leases …", file=sys.stderr)
        rows += leases.run(stack, arguments.seconds)
        rows += scale.run(stack, arguments.seconds)
    rows += rewrap.run()
    rows += vault.run(arguments.seconds, UNCAPPED)
    rows.append(audit.verify_speed())
    rows.append(_warm())
    rows.append(Row("load_before", load_before, "load", {"cores": os.cpu_count()}))
    rows.append(_stolen(before))
    write(rows, arguments.out)
    show(rows)


if __name__ == "__main__":
    main()
