"""One run of the command: the options that every command takes, and the connection."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from byokeep.cli.base import checked
from byokeep.cli.base.errors import CliError
from byokeep.cli.base.output import Output

if TYPE_CHECKING:
    from byokeep.client import Connection
    from byokeep.profile import Profile

_PANEL = "Common options"
_PAGE_LIMIT = 10_000


class Format(StrEnum):
    """Forms of output."""

    TEXT = "text"
    JSON = "json"
    SARIF = "sarif"
    GITHUB = "github"


class ReaderGone(Exception):
    """Whoever read standard output has closed it."""


@dataclass(slots=True)
class Options:
    """The common options as given, on whatever level of the command line."""

    profile: str | None = None
    config: Path | None = None
    tenant: str | None = None
    format: Format | None = None
    json: bool = False
    verbose: bool = False


class Session:
    """What a command works with. The connection opens when it is first used."""

    def __init__(self, options: Options) -> None:
        """Keep the options."""
        self.options = options
        self.format = Format.JSON if options.json else options.format or Format.TEXT
        self.out = Output(as_json=self.format == Format.JSON)

    @cached_property
    def profile(self) -> Profile:
        """Return the chosen profile. Raises ProfileError."""
        from byokeep.profile import load_profile

        return load_profile(self.options.profile, self.options.config)

    @cached_property
    def connection(self) -> Connection:
        """Return the connection. Raises ProfileError."""
        from byokeep.client import connect

        if self.options.tenant is not None:
            checked.tenant(self.options.tenant)
        return connect(self.profile, tenant=self.options.tenant)

    def close(self) -> None:
        """Close the connection, if there is one."""
        if "connection" in self.__dict__:
            self.connection.close()


@dataclass(slots=True)
class Run:
    """What survives a command, for the report of its errors and for the clean-up."""

    options: Options = field(default_factory=Options)
    session: Session | None = None


RUN: ContextVar[Run] = ContextVar("byokeep_run")


def request_id() -> str:
    """Return a fresh id for one mutation."""
    from byokeep.client import new_request_id

    return new_request_id()


def pages(call: Callable[[Any], Any], request: Any, field_name: str) -> Iterator[Any]:
    """Yield the items of every page of a list; `request` is changed on the way."""
    for _ in range(_PAGE_LIMIT):
        answer = call(request)
        yield from getattr(answer, field_name)
        if not answer.next_page_token:
            return
        request.page_token = answer.next_page_token
    raise CliError(f"the list has more than {_PAGE_LIMIT} pages")


_COMMON = {
    "profile": (
        Annotated[
            str | None,
            typer.Option(
                help="Profile of the config file.", metavar="NAME", rich_help_panel=_PANEL
            ),
        ],
        None,
    ),
    "config": (
        Annotated[
            Path | None,
            typer.Option(
                help="Config file; default: BYOKEEP_CONFIG, then .byokeep/config.toml of the"
                " byokeep checkout that this command runs from, then"
                " ~/.config/byokeep/config.toml. Never one of the working directory.",
                metavar="FILE",
                rich_help_panel=_PANEL,
            ),
        ],
        None,
    ),
    "tenant": (
        Annotated[
            str | None,
            typer.Option(
                help="Tenant, instead of the profile's.", metavar="NAME", rich_help_panel=_PANEL
            ),
        ],
        None,
    ),
    "format": (
        Annotated[
            Format | None,
            typer.Option(
                help="Form of the output; sarif and github for reviews only.",
                rich_help_panel=_PANEL,
                show_choices=True,
            ),
        ],
        None,
    ),
    "json": (
        Annotated[
            bool,
            typer.Option("--json", help="Same as --format json.", rich_help_panel=_PANEL),
        ],
        False,
    ),
    "verbose": (
        Annotated[
            bool,
            typer.Option("--verbose", help="Say more of errors.", rich_help_panel=_PANEL),
        ],
        False,
    ),
}


def examples(*lines: str) -> str:
    """Return the end of a command's help."""
    return "\n".join(("Example:\n" if len(lines) == 1 else "Examples:\n", *lines))


def command(*formats: Format) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function that takes a Session into one that typer can call.

    The common options are added to its signature, so that they may stand before or
    after any subcommand and show in every help. `formats` are those it can print
    besides text and JSON.
    """
    allowed = {Format.TEXT, Format.JSON, *formats}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(**given: Any) -> Any:
            run = RUN.get()
            _merge(run.options, {name: given.pop(name) for name in _COMMON})
            if (run.options.format or Format.TEXT) not in allowed:
                raise CliError(f"--format {run.options.format} is for reviews only")
            run.session = Session(run.options)
            try:
                return function(run.session, **given)
            except BrokenPipeError:
                # Out of typer's reach, which would exit 1: what --fail-on means.
                raise ReaderGone from None

        return _signed(wrapper, function)

    return decorate


def group(function: Callable[..., None]) -> Callable[..., None]:
    """Make the callback of a group that takes the common options and keeps them."""

    def wrapper(**given: Any) -> None:
        _merge(RUN.get().options, {name: given.pop(name) for name in _COMMON})
        function(**given)

    return _signed(wrapper, function)


def _merge(options: Options, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value:
            setattr(options, name, value)
    if options.json and options.format not in (None, Format.JSON):
        raise CliError("--json and another --format exclude each other")


def _signed(wrapper: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    # typer reads a command's options from its signature: the function's own, then the common.
    hints = typing.get_type_hints(function, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "session"
    ]
    common = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        for name, (annotation, default) in _COMMON.items()
    ]
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    wrapper.__name__ = function.__name__
    # typer keeps the line breaks of every paragraph but the first.
    wrapper.__doc__ = "\n\n".join(" ".join(text.split()) for text in paragraphs)
    wrapper.__signature__ = inspect.Signature(own + common)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {entry.name: entry.annotation for entry in own + common}
    return wrapper
