"""lease_cpu_ratio: what a LeaseKey costs keyvault, held against a bare mTLS echo.
lease_p99_ratio: how far the slowest hundredth is from the middle at half that load.

Both servers are saturated by the same client in the same run, in turns, so that what else
the machine does falls on both; CPU is what the operating system charged the server's
process. PostgreSQL's CPU is not in it: it is another process; the wait for its commit is
in the latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from byokeep import transport
from byokeep.testing import Stack

from tests.bench.keyvault_client import IN_FLIGHT, Meter, Tenant, pace, saturate
from tests.bench.results import Row, percentile

#: Leases are released after each turn, beside what is measured.
_TURN_SECONDS = 0.25


async def _measure(stack: Stack, seconds: float) -> list[Row]:
    tenant = Tenant(stack)
    await tenant.add_key()
    lease = Meter(stack.process("keyvault").pid, tenant.leasing())
    async with _echo(stack.root / "pki") as echo:
        for meter in (lease, echo):
            await saturate(meter.call, _TURN_SECONDS)
        for _ in range(round(seconds / _TURN_SECONDS)):
            await tenant.release()
            await lease.run(_TURN_SECONDS)
            await echo.run(_TURN_SECONDS)
    half: list[float] = []
    for _ in range(round(seconds)):
        await tenant.release()
        half += await pace(lease.call, lease.rate / 2, 1.0)
    middle, slow = percentile(half, 0.5), percentile(half, 0.99)
    return [
        Row(
            "lease_cpu_ratio",
            lease.cpu_us / echo.cpu_us,
            "ratio",
            {
                "lease_cpu_us": round(lease.cpu_us, 1),
                "echo_cpu_us": round(echo.cpu_us, 1),
                "leases_per_s": round(lease.rate, 1),
                "echoes_per_s": round(echo.rate, 1),
                "lease_p50_ms": round(percentile(lease.latencies, 0.5) * 1000, 2),
                "lease_p99_ms": round(percentile(lease.latencies, 0.99) * 1000, 2),
                "in_flight": IN_FLIGHT,
            },
        ),
        Row(
            "lease_p99_ratio",
            slow / middle,
            "ratio",
            {
                "p50_ms": round(middle * 1000, 2),
                "p99_ms": round(slow * 1000, 2),
                "leases_per_s": round(lease.rate / 2, 1),
                "leases": len(half),
            },
        ),
    ]


@contextlib.asynccontextmanager
async def _echo(pki: Path) -> AsyncIterator[Meter]:
    command = [sys.executable, "-m", "tests.bench.echo", str(pki / "keyvault.pem")]
    command += [str(pki / "keyvault.key"), str(pki / "ca.pem")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        files = transport.TlsFiles(pki / "runner.pem", pki / "runner.key", pki / "ca.pem")
        address, name = f"127.0.0.1:{port}", "keyvault.byokeep.internal"
        try:
            async with transport.aio_channel(address, name, files) as channel:
                echo = channel.unary_unary("/bench.Echo/Echo")
                payload = b"x" * 1600  # about what a LeaseKey request has

                async def call() -> object:
                    return await echo(payload)

                yield Meter(server.pid, call)
        finally:
            server.terminate()


def run(stack: Stack, seconds: float) -> list[Row]:
    """Measure on a stack whose keyvault has no lease cap in the way."""
    return asyncio.run(_measure(stack, seconds))
