"""`python -m deploy.compose up | down`: the Compose stack, with tenant demo and a profile.

The profile is written to build/compose/config.toml; BYOKEEP_CONFIG names it to the command.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc

from deploy.dev import trust
from deploy.docker.images import ImageError, docker
from deploy.local import seed
from deploy.local.material import PROVIDER_HOSTS, ROLES, TENANT, write_profiles
from deploy.local.pki import Identity, write_file
from deploy.local.processes import wait_for
from deploy.local.state import CHECKOUT, State

HERE = Path(__file__).resolve().parent
STATE = CHECKOUT / "build/compose"
# What says where a service is published, and where it is if nothing does.
_PORTS = {"orchestrator": ("ORCHESTRATOR_PORT", "8443"), "keyvault": ("KEYVAULT_PORT", "8444")}
_HEALTHY_SECONDS = 300.0
_SERVICES = ("keyvault-data", "keyvault-admin", "orchestrator", "runner")


class ComposeError(Exception):
    """Compose can't do what was asked; the text is its own."""


def up(*, live: bool) -> None:
    """Start everything, wait until it serves, make tenant demo and the profile."""
    environment = {} if live else _emulated()
    _compose(environment, "up", "--detach")
    for service in _SERVICES:
        _healthy(environment, service)
    _profile(environment)


def down(*, volumes: bool) -> None:
    """Stop everything; with `volumes` its data goes, too."""
    _compose(_emulated(), "down", "--remove-orphans", *(["--volumes"] if volumes else []))


def _emulated() -> dict[str, str]:
    return {
        "COMPOSE_PROFILES": "emulator",
        "BYOKEEP_PROVIDER_DIAL": " ".join(f"{host}=emulator:8443" for host in PROVIDER_HOSTS),
        "BYOKEEP_PROVIDER_CA": "/etc/byokeep/provider-ca/ca.pem",
    }


def _compose(environment: Mapping[str, str], *arguments: str) -> str:
    command = [*_command(), "--project-name=byokeep", f"--file={HERE / 'compose.yaml'}", *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode != 0:
        raise ComposeError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def _command() -> Sequence[str]:
    """Return Compose's command: the plugin's, or the older program's."""
    plugin = subprocess.run(
        ["docker", "compose", "version"],  # noqa: S607 found on PATH
        check=False,
        capture_output=True,
    )
    if plugin.returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    raise ComposeError("there is neither `docker compose` nor `docker-compose`")


def _healthy(environment: Mapping[str, str], service: str) -> None:
    container = _container(environment, service)
    status = ("inspect", "--format={{.State.Health.Status}}", container)
    if not wait_for(lambda: docker(*status) == "healthy", _HEALTHY_SECONDS):
        log = _compose(environment, "logs", "--tail=20", service)
        raise ComposeError(f"{service} does not serve:\n{log}")


def _profile(environment: Mapping[str, str]) -> None:
    """Write certificates, trust bundle and profiles for this host; make the tenant."""
    shutil.rmtree(STATE, ignore_errors=True)
    state = State(STATE)
    for folder in (state.client, state.pki):
        folder.mkdir(mode=0o700, parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        volume = Path(scratch) / "client"
        container = docker(
            "create", "--volume=byokeep_client:/client:ro", f"byokeep/tools:{_tag()}"
        )
        try:
            docker("cp", f"{container}:/client/.", str(volume))
        finally:
            docker("rm", container)
        for role in ROLES:
            files = Identity.at(state.client / role)
            for name, path, mode in (("crt", files.certificate, 0o644), ("key", files.key, 0o600)):
                content = (volume / f"client-{role}" / f"tls.{name}").read_bytes()
                write_file(path, content, mode=mode)
        ca = (volume / "byokeep-ca/ca.pem").read_bytes()
    write_file(state.pki / "ca.pem", ca, mode=0o644)
    bundle = trust.printed(docker("logs", _container(environment, "keyvault-migrate")))
    write_file(state.trust, bundle.encode(), mode=0o644)
    addresses = {zone: f"127.0.0.1:{os.environ.get(*port)}" for zone, port in _PORTS.items()}
    seed.create_tenant(state, TENANT, **addresses)
    write_profiles(state.config, state, **addresses)


def _container(environment: Mapping[str, str], service: str) -> str:
    return _compose(environment, "ps", "--all", "--quiet", service).strip()


def _tag() -> str:
    return os.environ.get("TAG", "dev")


def main(argv: list[str] | None = None) -> int:
    """Run a command; 1 where it failed."""
    parser = argparse.ArgumentParser(prog="python -m deploy.compose", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up", help="start everything, with tenant demo")
    start.add_argument("--live", action="store_true", help="the providers themselves; real keys")
    stop = commands.add_parser("down", help="stop everything; its data stays")
    stop.add_argument("--volumes", action="store_true", help="its data goes, too")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "up":
            up(live=arguments.live)
            print(f"export BYOKEEP_CONFIG={State(STATE).config}")  # noqa: T201 for a person
        else:
            down(volumes=arguments.volumes)
    except (ComposeError, ImageError, grpc.RpcError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
