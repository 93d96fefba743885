"""`byokeep model`: which models the tenant's keys can use, and which reviews use."""

from __future__ import annotations

from typing import Annotated

import typer

from byokeep.cli.base import checked
from byokeep.cli.base.errors import CliError
from byokeep.cli.base.output import message_dict
from byokeep.cli.base.session import Session, command, examples, group, pages, request_id
from byokeep.cli.base.text import clean
from byokeep.cli.settings import shared as tenant_settings
from byokeep.orchestrator.v1 import settings_pb2

app = typer.Typer(no_args_is_help=True)

_USES = {
    settings_pb2.MODEL_USE_NO_KEY: " (no active key of its provider)",
    settings_pb2.MODEL_USE_LACKING: " (no key can use it: reviews that would take it are refused)",
}

#: Every repository, where only paths are given.
_ALL = "*"

Pattern = Annotated[
    str | None,
    typer.Option("--repo", metavar="PATTERN", help="For these repositories, such as 'acme/*'."),
]


Paths = Annotated[
    str | None,
    typer.Option(
        "--path",
        metavar="PATTERN",
        help="Only where such a path is changed, such as 'services/pay/*'.",
    ),
]


@app.callback()
@group
def model() -> None:
    """Models: a review's own, else the repository's, else the tenant's default."""


@app.command("list", epilog=examples("byokeep model list"))
@command()
def list_(session: Session) -> None:
    """List the models that the tenant's keys can use, and which are chosen."""
    models, cut = _models(session)
    settings = tenant_settings.read(session)
    if session.out.as_json:
        overrides = [message_dict(entry) for entry in settings.model_overrides]
        session.out.json(
            {
                "models": [message_dict(entry) for entry in models],
                "defaultModel": settings.default_model,
                "fallbackModels": list(settings.fallback_models),
                "modelOverrides": overrides,
            }
        )
        return
    if models:
        columns = ("MODEL", "KEYS", "CHOSEN")
        rows = [(clean(entry.model), str(entry.key_count), _chosen(entry)) for entry in models]
        session.out.table(columns, rows)
    else:
        session.out.print("no model is known: none of the tenant's keys has been validated")
    if cut:
        session.out.warn("a provider lists more models of a key than the 1,000 that are kept")
    _print_choice(session, settings, models)


@app.command(
    "set",
    epilog=examples(
        "byokeep model set openai/gpt-6.1-terra",
        "byokeep model set anthropic/claude-sonnet-5-5 --repo 'acme/*'",
        "byokeep model set openai/gpt-6-astra --repo acme/shop --path 'services/pay/*'",
    ),
)
@command()
def set_(
    session: Session,
    chosen: Annotated[
        str,
        typer.Argument(
            metavar="PROVIDER/MODEL", show_default=False, help="As model list spells it."
        ),
    ],
    repo: Pattern = None,
    path: Paths = None,
) -> None:
    """Choose the model of the tenant, or of some of its repositories and of paths in them.

    Of the patterns that match, the longest --repo wins, then the longest --path; * matches slashes,
    too. A review has one model, whatever else it changes.
    """
    settings = _change(session, checked.model(chosen), repo, path)
    uses = {settings.default_model: settings.default_model_use} | {
        entry.model: entry.use for entry in settings.model_overrides
    }
    provider = chosen.partition("/")[0]
    if uses.get(chosen) == settings_pb2.MODEL_USE_NO_KEY:
        session.out.warn(f"there is no active {provider} key yet: byokeep key add {provider}")
    elif uses.get(chosen) == settings_pb2.MODEL_USE_UNSPECIFIED:
        session.out.note("whether a key can use it is not known: no provider's list says so")


@app.command(
    epilog=examples(
        "byokeep model fallback openai/gpt-6.1-terra openai/gpt-6-luna",
        "byokeep model fallback --none",
    )
)
@command()
def fallback(
    session: Session,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROVIDER/MODEL]...", show_default=False, help="First first."),
    ] = None,
    none: Annotated[bool, typer.Option("--none", help="None takes another's place.")] = False,
) -> None:
    """List models that take the place of one that the settings chose and the key can't use.

    Of the same provider and on the same key; a review says which it ran on, and why. A model that
    a review names with --model is never replaced.
    """
    if bool(models) is none:
        raise CliError("name models, or --none", "byokeep model list")
    wanted = [checked.model(model) for model in models or ()]
    if len(set(wanted)) < len(wanted):
        raise CliError("each model once")
    _print_changed(session, tenant_settings.change(session, fallback_models=wanted))


@app.command(epilog=examples("byokeep model unset --repo 'acme/*'"))
@command()
def unset(session: Session, repo: Pattern = None, path: Paths = None) -> None:
    """Take the tenant's default away, or the choice for some of its repositories."""
    _need_choice(session, repo, path)
    _change(session, "", repo, path)


def _need_choice(session: Session, repo: str | None, path: str | None) -> None:
    settings = tenant_settings.read(session)
    if repo is None and path is None:
        if not settings.default_model:
            raise CliError("the tenant has no default model", "byokeep model list")
        return
    wanted = (checked.pattern(repo or _ALL), checked.path_pattern(path) if path else "")
    entries = settings.model_overrides
    if wanted not in [(entry.repository_pattern, entry.path_pattern) for entry in entries]:
        there = f"; there is one for {', '.join(map(_where, entries))}" if entries else ""
        raise CliError(f"no model is chosen for those patterns{there}")


def _models(session: Session) -> tuple[list[settings_pb2.Model], bool]:
    """Return the models, and whether some provider lists more than are kept."""
    connection = session.connection
    cut = False

    def page(request: settings_pb2.ListModelsRequest) -> settings_pb2.ListModelsResponse:
        nonlocal cut
        answer = connection.settings.ListModels(request)
        cut = cut or answer.cut
        return answer

    request = settings_pb2.ListModelsRequest(parent=connection.parent, page_size=1000)
    return list(pages(page, request, "models")), cut


def _change(
    session: Session, chosen: str, repo: str | None, path: str | None
) -> settings_pb2.Settings:
    connection = session.connection
    if repo is not None or path is not None:
        override = settings_pb2.SetModelOverrideRequest(
            parent=connection.parent,
            repository_pattern=checked.pattern(repo or _ALL),
            path_pattern=checked.path_pattern(path) if path else "",
            model=chosen,
            request_id=request_id(),
        )
        settings = connection.settings.SetModelOverride(override).settings
    else:
        settings = tenant_settings.change(session, default_model=chosen)
    _print_changed(session, settings)
    return settings


def _print_changed(session: Session, settings: settings_pb2.Settings) -> None:
    if session.out.as_json:
        session.out.json(message_dict(settings))
    else:
        _print_choice(session, settings, [] if settings.default_model else _models(session)[0])


def _print_choice(
    session: Session, settings: settings_pb2.Settings, models: list[settings_pb2.Model]
) -> None:
    providers = {entry.model.partition("/")[0] for entry in models}
    none = "none: reviews use that of the only provider with an active key"
    if len(providers) > 1:
        none = "none: choose one with byokeep model set"
    use = _USES.get(settings.default_model_use, "")
    session.out.print(f"default: {clean(settings.default_model) or none}{use}")
    if settings.fallback_models:
        session.out.print(f"else:    {clean(', '.join(settings.fallback_models))}")
    for entry in settings.model_overrides:
        notes = _USES.get(entry.use, "")
        if entry.plan_lacks:
            notes = f" (does not count: plan {clean(settings.plan)} has no models per repository)"
        elif entry.matches_none:
            notes += " (matches the repository of no review so far)"
        session.out.print(f"{_where(entry)}: {clean(entry.model)}{notes}")


def _where(entry: settings_pb2.ModelOverride) -> str:
    paths = f" {clean(entry.path_pattern)}" if entry.path_pattern else ""
    return clean(entry.repository_pattern) + paths


def _chosen(entry: settings_pb2.Model) -> str:
    marks = ["tenant's default"] * entry.tenant_default
    marks += ["provider's default"] * entry.provider_default
    return ", ".join(marks)
