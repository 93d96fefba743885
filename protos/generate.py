"""Makes the typed Python stubs of `byokeep` from protos/, and the image that buf checks.

Run by `make protos` and by the build of the pip package. protoc comes from grpcio-tools;
buf/validate/validate.proto is protovalidate's own, kept here so that plain protoc and plain
buf compile these files for any language.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "clients" / "python" / "src" / "byokeep"
ZONES = ("common", "keyvault", "orchestrator", "runner")
VALIDATE = "buf/validate/validate.proto"


def _run(*arguments: str) -> None:
    include = str(resources.files("grpc_tools") / "_proto")
    if protoc.main(["protoc", *arguments, f"-I{HERE}", f"-I{include}"]) != 0:
        sys.exit(f"protoc failed: {' '.join(arguments)}")


def _own(output: Path) -> None:
    """Point imports of buf.validate at byokeep._buf: a wheel ships no top-level `buf`."""
    for path in output.rglob("*_pb2*.py*"):
        text = path.read_text()
        text = re.sub(
            r"^from buf\.validate import", "from byokeep._buf.validate import", text, flags=re.M
        )
        text = re.sub(
            r"^import buf\.validate\.validate_pb2.*$",
            "import byokeep._buf.validate.validate_pb2",
            text,
            flags=re.M,
        )
        path.write_text(text)


def main() -> None:
    """Generate the stubs, or with --image FILE only the descriptor image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path, help="write the descriptor image for buf, and stop")
    parser.add_argument(
        "--package", type=Path, default=PACKAGE, help="the package that gets the stubs"
    )
    arguments = parser.parse_args()
    sources = sorted(str(p.relative_to(HERE)) for p in HERE.glob("byokeep/**/*.proto"))
    if arguments.image:
        _run(
            "--include_imports",
            "--include_source_info",
            f"--descriptor_set_out={arguments.image}",
            *sources,
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        _stubs(sources, Path(scratch), arguments.package)


def _stubs(sources: list[str], output: Path, package: Path) -> None:
    _run(
        f"--python_out={output}",
        f"--mypy_out={output}",
        f"--grpc_python_out={output}",
        f"--mypy_grpc_out={output}",
        *sources,
    )
    _run(f"--python_out={output}", f"--mypy_out={output}", VALIDATE)
    _own(output)
    for zone in ZONES:
        shutil.rmtree(package / zone, ignore_errors=True)
        shutil.copytree(output / "byokeep" / zone, package / zone)
    shutil.rmtree(package / "_buf", ignore_errors=True)
    shutil.copytree(output / "buf", package / "_buf")


if __name__ == "__main__":
    main()
