"""`python -m deploy.docker build | digest | sign | verify`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.docker import images, signing
from deploy.docker.layout import IMAGES


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.docker", description="Builds, compares and signs byokeep's images."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build images")
    known = f"of {', '.join(IMAGES)}; none: all"
    build.add_argument("zones", nargs="*", metavar="ZONE", help=known)
    build.add_argument("--tag", default="dev", help="version (default: dev)")
    build.add_argument("--no-cache", action="store_true", help="build every step anew")
    digest = commands.add_parser("digest", help="print the digest of what is in an image")
    sign = commands.add_parser("sign", help="print a signed statement of what is in an image")
    verify = commands.add_parser("verify", help="check an image against its statement")
    for command in (digest, sign, verify):
        command.add_argument("image", help="name:tag")
    sign.add_argument("--key", type=Path, required=True, help="PEM file: Ed25519 private key")
    verify.add_argument("statement", type=Path, help="file that `sign` printed")
    verify.add_argument("--key", type=Path, required=True, help="PEM file: Ed25519 public key")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a command; 1 where it failed, or the image is not what was signed."""
    arguments = _arguments(argv)
    try:
        _run(arguments)
    except (images.ImageError, signing.SignatureError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 for a person
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    match arguments.command:
        case "build":
            for zone in arguments.zones or IMAGES:
                name = images.build(zone, arguments.tag, cache=not arguments.no_cache)
                _say(f"{name} {images.tree(name).digest}")
        case "digest":
            _say(images.tree(arguments.image).digest)
        case "sign":
            _say(signing.sign(arguments.image, arguments.key))
        case _:
            signing.verify(arguments.image, arguments.statement.read_text(), arguments.key)
            _say(f"{arguments.image}: as it was signed")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
