"""``python -m deploy.local.emulator``: run the provider emulator until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import ssl
from pathlib import Path

from byokeep.testing.faults import FAULTS

from deploy.local.emulator.app import App
from deploy.local.emulator.control_api import ControlApi
from deploy.local.emulator.http import serve
from deploy.local.emulator.state import State

_EPILOG = f"""\
keys:
  Only keys registered through the control listener are valid, unless --accept-any is
  given: then every key of the provider's shape is (openai sk-..., anthropic sk-ant-...,
  gemini AIza... or AQ...., 20 characters or more). A word in a key decides first:
    invalid      the provider's real answer to a wrong key
    restricted   may not list models; reviews work
    noquota      quota or credit is gone, for every call

control listener (JSON; byokeep.testing.emulator has a client for it):
  GET /calls?since=N   DELETE /calls
  GET /faults          POST /faults {{"kind", "provider", "path", "key", "times", ...}}
  DELETE /faults       POST /keys {{"provider", "key", "behaviour"}}
  POST /latency {{"seconds"}}    POST /release    POST /reset

fault kinds:
{"".join(f"  {kind:17} {says}" + chr(10) for kind, says in FAULTS.items())}"""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.local.emulator",
        description="Emulates the OpenAI, Anthropic and Gemini APIs over HTTPS on one port; "
        "the Host header says which one is meant.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cert", type=Path, required=True, help="certificate chain (PEM)")
    parser.add_argument("--key", type=Path, required=True, help="its private key (PEM)")
    parser.add_argument("--host", default="127.0.0.1", help="address of the HTTPS listener")
    parser.add_argument("--https-port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--control-port", type=int, default=0, help="0 takes a free one")
    parser.add_argument(
        "--control-host", default="127.0.0.1", help="address of the control listener"
    )
    parser.add_argument(
        "--ready-file", type=Path, help="written when ready: pid, https_port, control_port (JSON)"
    )
    parser.add_argument("--accept-any", action="store_true", help="accept all plausible keys")
    parser.add_argument(
        "--latency", type=float, default=0.0, metavar="SECONDS", help="added to every call"
    )
    return parser.parse_args(argv)


def _tls(arguments: argparse.Namespace) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(arguments.cert, arguments.key)
    context.set_alpn_protocols(["http/1.1"])
    context.num_tickets = 0  # nobody resumes a session here, and tickets cost CPU
    return context


def _write_ready(path: Path, https_port: int, control_port: int) -> None:
    ready = {"pid": os.getpid(), "https_port": https_port, "control_port": control_port}
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(ready))
    scratch.replace(path)


async def _run(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    state = State(accept_any=arguments.accept_any, latency_seconds=arguments.latency)
    control_api, app = ControlApi(state), App(state)
    control = await serve(control_api.handle, arguments.control_host, arguments.control_port)
    https = await serve(
        app.handle, arguments.host, arguments.https_port, _tls(arguments), state.hangs
    )
    if arguments.ready_file is not None:
        _write_ready(arguments.ready_file, https.port, control.port)
    gc.freeze()
    await stop.wait()
    https.close()
    control.close()


def main(argv: list[str] | None = None) -> None:
    """Run the emulator; returns after SIGTERM or SIGINT."""
    asyncio.run(_run(_arguments(argv)))


if __name__ == "__main__":
    main()
