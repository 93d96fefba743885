"""Arguments whose form is checked here, for a better sentence than a pattern's."""

from __future__ import annotations

import re

from byokeep.cli.base.errors import CliError

_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_PLAN = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_MODEL = re.compile(r"(openai|anthropic|gemini)/[A-Za-z0-9._:-]{1,100}")
_SPIFFE = re.compile(r"spiffe://[a-z0-9.-]{1,255}(?=.{2,513}$)(/[A-Za-z0-9._-]+)+")
_REPOSITORY = re.compile(r"[A-Za-z0-9._/-]{1,200}")
_PATTERN = re.compile(r"[A-Za-z0-9._/*?-]{1,200}")
_PATHS = re.compile(r"[A-Za-z0-9._/*?@+~ -]{1,200}")
_USER = re.compile(r"[A-Za-z0-9._@+-]{0,128}")
_CHAIN = re.compile(rf"system|tenants/{_TENANT.pattern}")
_LEASE = re.compile(r"lea_[0-9a-z]{26}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RESOURCE = re.compile(rf"tenants/({_TENANT.pattern})/([a-zA-Z]+)/([0-9a-z_]+)")


_SPIFFE_FORM = (
    "a SPIFFE ID is spiffe://TRUST-DOMAIN/PATH, such as spiffe://acme.example/ci: a domain of"
    " lower-case letters, digits, dots and hyphens, then one or more parts, each after a slash"
)


def tenant(text: str) -> str:
    """Return the name of a tenant. Raises CliError."""
    return _check(_TENANT, text, "a tenant's name is lower-case letters, digits and hyphens")


def plan(text: str) -> str:
    """Return the name of a plan. Raises CliError."""
    return _check(_PLAN, text, "a plan's name is lower-case letters, digits and hyphens")


def model(text: str) -> str:
    """Return PROVIDER/MODEL. Raises CliError."""
    what = "a model is PROVIDER/MODEL, such as openai/gpt-6.1-terra (or anthropic/, gemini/)"
    return _check(_MODEL, text, what, "byokeep model list")


def spiffe_id(text: str) -> str:
    """Return a SPIFFE ID. Raises CliError."""
    return _check(
        _SPIFFE,
        text,
        _SPIFFE_FORM,
        "byokeep caller list shows those of the tenant, byokeep doctor your own",
    )


def repository(text: str) -> str:
    """Return OWNER/NAME. Raises CliError."""
    return _check(_REPOSITORY, text, "a repository is OWNER/NAME: letters, digits and . _ / -")


def pattern(text: str) -> str:
    """Return a shell pattern of repositories. Raises CliError."""
    return _check(_PATTERN, text, "a pattern of repositories looks like acme/*")


def path_pattern(text: str) -> str:
    """Return a shell pattern of paths. Raises CliError."""
    return _check(_PATHS, text, "a pattern of paths looks like services/pay/*")


def user(text: str) -> str:
    """Return a user's name; empty: the tenant. Raises CliError."""
    return _check(_USER, text, "--user takes at most 128 letters, digits and . _ @ + -")


def chain(text: str) -> str:
    """Return the name of an audit chain. Raises CliError."""
    return _check(_CHAIN, text, "--chain takes tenants/NAME or system")


def lease(text: str) -> str:
    """Return the id of a lease. Raises CliError."""
    return _check(
        _LEASE,
        text,
        "a lease's id is lea_ and 26 letters and digits",
        "byokeep key trail KEY shows them",
    )


def key_name(text: str) -> str:
    """Return the display name of a key. Raises CliError."""
    return _check(_NAME, text, "--name takes 1 to 64 letters, digits, dots, hyphens, underscores")


def key_reference(text: str) -> str:
    """Return the name or id of a key. Raises CliError."""
    return _check(_NAME, text, "--key takes the name or the id of a key", "byokeep key list")


def last_part(text: str, tenant: str, collection: str) -> str:
    """Return the id of a full resource name of that tenant; any other text as it is.

    Raises CliError where it names another tenant, or something else than the collection's.
    """
    if not text.startswith("tenants/"):
        return text
    parts = _RESOURCE.fullmatch(text)
    if parts is None or parts[2] != collection:
        raise CliError(f"the full name here is tenants/{tenant}/{collection}/ID; or give the ID")
    if parts[1] != tenant:
        raise CliError(
            f"that is of tenant {parts[1]}, and this command is for tenant {tenant}",
            f"add --tenant {parts[1]}, if you have a role for it",
        )
    return parts[3]


def _check(form: re.Pattern[str], text: str, sentence: str, hint: str = "") -> str:
    # The text itself is not shown: it may be a secret at the wrong place.
    if not form.fullmatch(text):
        raise CliError(sentence, hint)
    return text
