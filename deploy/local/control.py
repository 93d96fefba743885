"""`python -m deploy.local.control`: a stack that listens to others, and does as they say.

It is what image `all-in-one` runs, and `byokeep.testing.containers` its client: JSON over HTTP,
`POST /COMMAND` with a command's arguments. The settings come in one environment variable. Whoever
has its token may do everything to the stack.
"""

from __future__ import annotations

import hmac
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

from byokeep.testing.remote import PORTS, SETTINGS

from . import material
from .background import health, show
from .processes import StackError
from .state import State, throwaway_state
from .supervisor import LocalStack
from .topology import SERVICES

_EVERYWHERE = "0.0.0.0"  # noqa: S104 it is in a container, whose published ports decide


class Commands:
    """What a client may ask for; each returns what JSON can say. Raises StackError, TypeError,
    ValueError or KeyError for what makes no sense."""

    def __init__(self, stack: LocalStack) -> None:
        """The stack is started."""
        self._stack = stack
        self.table: dict[str, Callable[..., Any]] = {
            "health": self.health,
            "process": self.process,
            "wait_ready": stack.wait_ready,
            "log": lambda name: stack.process(name).log.read_text(errors="replace"),
            "database_url": stack.database_url,
            "authority": lambda: stack.authority.pem,
            "issue": self.issue,
            "client_files": self.client_files,
        }

    def health(self) -> dict[str, str]:
        """What each service says of itself, as `make status` prints it."""
        return {
            name: health(name, self._stack.process(name).pid, self._stack.topology.ports)
            for name in SERVICES
        }

    def process(
        self, name: str, do: str, number: str = "SIGTERM", seconds: float = 10.0
    ) -> dict[str, Any]:
        """Look at a process, `kill`, `start` or `stop` it, or send it a `signal`."""
        process = self._stack.process(name)
        match do:
            case "look":
                pass
            case "kill":
                process.kill()
            case "start":
                process.start()
            case "stop":
                process.stop(seconds)
            case "signal":
                process.signal(signal.Signals[number])
            case _:
                raise ValueError(f"a process does not {do}")
        return {
            "pid": process.pid,
            "running": process.running,
            "exit_status": process.exit_status,
        }

    def issue(
        self, name: str, spiffe_id: str | None, dns: Sequence[str], uris: Sequence[str] | None
    ) -> dict[str, str]:
        """Make a certificate."""
        with tempfile.TemporaryDirectory(dir=self._stack.state.root) as folder:
            files = self._stack.authority.issue(
                Path(folder, Path(name).name), spiffe_id=spiffe_id, dns=dns, uris=uris
            )
            return {"certificate": files.certificate.read_text(), "key": files.key.read_text()}

    def client_files(self, root: str, orchestrator: str, keyvault: str) -> dict[str, str]:
        """The files of `client/` as they are to stand below a client's folder, with the addresses
        that it reaches."""
        folder = self._stack.state.client
        scratch = folder / "config-elsewhere.toml"
        material.write_profiles(scratch, State(Path(root)), orchestrator, keyvault)
        files = {path.name: path.read_text() for path in folder.iterdir() if path != scratch}
        return files | {"config.toml": scratch.read_text()}


def _handler(commands: Commands, token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, document = self._answer()
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _answer(self) -> tuple[int, dict[str, Any]]:
            command = self.path.removeprefix("/")
            given = self.headers.get("Authorization", "").encode()
            # What the container's own health check asks for tells nothing.
            expected = f"Bearer {token}".encode()
            known = token and hmac.compare_digest(given, expected)
            if command != "health" and not known:
                return 403, {"error": "the token is another"}
            if command not in commands.table:
                return 404, {"error": f"no command {command}: {', '.join(commands.table)}"}
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                result = commands.table[command](**json.loads(body or b"{}"))
            except (StackError, TypeError, ValueError, KeyError, OSError) as error:
                return 400, {"error": str(error)}
            if command == "health" and set(result.values()) != {"SERVING"}:
                return 503, {"error": json.dumps(result)}
            return 200, {"result": result}

        def log_message(self, format: str, *arguments: object) -> None:
            del format, arguments

    return Handler


def _stop(number: int, frame: FrameType | None) -> None:
    del number, frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Run a stack until SIGTERM; 1 where it does not come up."""
    settings = json.loads(os.environ.pop(SETTINGS, "{}"))
    fixed = {name: number for name, number in PORTS.items() if name not in ("control", "postgres")}
    with throwaway_state(in_memory=settings.get("in_memory", True)) as state:
        try:
            stack = LocalStack(
                state,
                live=settings.get("live", False),
                extra=settings.get("environment"),
                ports=fixed,
                host=_EVERYWHERE,
                report=show,
            )
            stack.start()
        except StackError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        try:
            # One thread, this one: the kernel ends the processes with whoever started them.
            handler = _handler(Commands(stack), settings.get("token", ""))
            HTTPServer((_EVERYWHERE, PORTS["control"]), handler).serve_forever()
        except KeyboardInterrupt:
            return 0
        finally:
            stack.stop(discard=True)
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, _stop)
    sys.exit(main())
