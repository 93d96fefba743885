"""Makes docs/reference/ from the code: settings, error reasons, and who may call what.

`make docs` builds them into the site; no page of them is committed.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import typing
from pathlib import Path
from typing import Any

from byokeep.common.v1 import options_pb2
from google.protobuf import descriptor_pb2

CHECKOUT = Path(__file__).resolve().parent.parent
_MADE = "<!-- Made of the code by docs/generate.py. -->\n"
_SERVICES = ("keyvault", "orchestrator", "llm_runner")
# Field numbers of descriptor.proto, which paths of source locations are made of.
_ENUM_TYPE, _ENUM_VALUE, _SERVICE, _METHOD = 5, 2, 6, 2


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    protos = _protos()
    return {
        "configuration.md": _configuration(),
        "errors.md": _errors(protos),
        "methods.md": _methods(protos),
    }


def _protos() -> descriptor_pb2.FileDescriptorSet:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image.binpb")
        subprocess.run(
            [sys.executable, str(CHECKOUT / "protos" / "generate.py"), "--image", str(image)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())


# --- settings


def _configuration() -> str:
    from services.common import config
    from services.keyvault import config as keyvault
    from services.llm_runner import config as llm_runner
    from services.orchestrator import config as orchestrator

    text = [
        "# Settings\n",
        _MADE,
        "Every setting is an environment variable. Those that are secret are paths of files,"
        " which nobody but the service's user may read. A service checks all of them before it"
        " opens anything; for a missing or wrong one it says which, what is allowed, and exits"
        " with 78.\n",
        "## Every service\n",
        _table(config.ServiceSettings, frozenset()),
    ]
    shared = frozenset(_defaults(config.ServiceSettings).items())
    for name, module in zip(_SERVICES, (keyvault, orchestrator, llm_runner), strict=True):
        text += [f"## {name}\n", _table(module.Settings, shared)]
    return "\n".join(text)


def _defaults(settings: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(settings)}


def _table(settings: type, shared: frozenset[tuple[str, Any]]) -> str:
    hints = typing.get_type_hints(settings)
    rows = [
        f"| `BYOKEEP_{field.name.upper()}` | {_default(field.default)} |"
        f" {_kind(hints[field.name])} | {field.metadata['help'].replace('|', '/')} |"
        for field in dataclasses.fields(settings)
        if (field.name, field.default) not in shared
    ]
    return "\n".join(
        ["| setting | default | kind | what it is |", "| --- | --- | --- | --- |", *rows, ""]
    )


def _default(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "**required**"
    if default is None or default == "":
        return "none"
    return "no" if default is False else f"`{default}`"


def _kind(hint: Any) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of the names"
    if type(None) in options:
        hint = next(one for one in options if one is not type(None))
    return {int: "number", bool: "yes or no", Path: "path", str: "text"}[hint]


# --- error reasons and methods


def _errors(protos: descriptor_pb2.FileDescriptorSet) -> str:
    file = next(one for one in protos.file if one.name.endswith("/error_reason.proto"))
    rows = []
    for place, value in enumerate(file.enum_type[0].value):
        if value.number == 0:
            continue
        comment = _comment(file, _ENUM_TYPE, 0, _ENUM_VALUE, place)
        code, _, rest = comment.partition(". ")
        meaning, _, example = rest.partition(" Example: ")
        name = value.name.removeprefix("ERROR_REASON_")
        rows.append(f"| `{name}` | {code} | {_cell(meaning)} | `{example.replace('|', '/')}` |")
    return "\n".join(
        [
            "# Error reasons\n",
            _MADE,
            "Each error that byokeep means to send has a gRPC code and a `google.rpc.ErrorInfo`"
            " of domain `byokeep.dev` with one of these reasons; `RetryInfo` beside it says when"
            " to try again, where that is known. No error holds a key, a diff or a provider's own"
            " text.\n",
            "| reason | code | what it means | metadata, as an example |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _methods(protos: descriptor_pb2.FileDescriptorSet) -> str:
    text = [
        "# Methods and who may call them\n",
        _MADE,
        "A caller's class comes from the SPIFFE ID of its certificate, by the callee's"
        " `BYOKEEP_CALLERS`; a client's roles are per tenant (`byokeep caller`). A method without"
        " a declared caller stops its server's start.\n",
    ]
    for file in protos.file:
        for place, service in enumerate(file.service):
            if not file.package.startswith("byokeep."):
                continue
            text += [f"## {file.package}.{service.name}\n", _comment(file, _SERVICE, place), ""]
            text += ["| method | callers | roles | what it does |", "| --- | --- | --- | --- |"]
            for number, method in enumerate(service.method):
                access = method.options.Extensions[options_pb2.access]
                text.append(
                    f"| `{method.name}` | {_named(options_pb2.CallerClass, access.callers)}"
                    f" | {_named(options_pb2.TenantRole, access.roles)}"
                    f" | {_cell(_comment(file, _SERVICE, place, _METHOD, number))} |"
                )
            text.append("")
    return "\n".join(text)


def _named(enum: Any, values: typing.Iterable[int]) -> str:
    names = [enum.Name(value).split("_", 2)[2].lower().replace("_", "-") for value in values]
    return ", ".join(names) or "-"


def _file(
    protos: descriptor_pb2.FileDescriptorSet, name: str
) -> descriptor_pb2.FileDescriptorProto:
    return next(file for file in protos.file if file.name == name)


def _comment(file: descriptor_pb2.FileDescriptorProto, *path: int) -> str:
    """Return what stands above a declaration, on one line."""
    for location in file.source_code_info.location:
        if tuple(location.path) == path:
            return " ".join(location.leading_comments.split())
    return ""


def _cell(text: str) -> str:
    return text.replace("|", "/")
