"""Keys as people see them; the key itself can't be read back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from byokeep.cli.base.output import message_dict, short, state_text, when
from byokeep.cli.base.session import Session
from byokeep.cli.base.text import clean
from byokeep.cli.keys.ref import ENDED, OPERATOR, key_id, key_state, label_of, provider_of
from byokeep.cli.keys.verdict import serving_verdict, unreachable_part, verdict_of
from byokeep.keyvault.v1 import custody_pb2

if TYPE_CHECKING:
    from rich.text import Text

    from byokeep.orchestrator.v1.key_pb2 import Key


def print_key(session: Session, key: Key) -> None:
    """Print a key with its versions."""
    out, kept = session.out, key.provider_key
    out.print(f"{key_id(key)}  {provider_of(key)}  {clean(kept.display_name)}", style="bold")
    owner = clean(kept.owner) or "the tenant"
    out.print(f"owner     {'the operator: it is managed' if kept.owner == OPERATOR else owner}")
    out.print(f"added     {when(kept.create_time)}")
    # What a provider said of a key that has ended means nothing any more.
    ended = kept.state in ENDED
    out.print(f"verdict   {'none that counts: the key has ended' if ended else _verdict(key)}")
    if key.validation.models and not ended:
        models = [clean(model) for model in key.validation.models]
        more = f" and {len(models) - 8} more" if len(models) > 8 else ""
        out.print(f"models    {', '.join(models[:8])}{more}")
        if key.validation.models_cut:
            out.print("          its provider lists more, which are not kept")
    out.print()
    columns = ("VERSION", "STATE", "HINT", "STAGED", "SINCE", "KEK")
    out.table(
        columns,
        [
            (
                f"v{version.version}",
                state_text(short(custody_pb2.KeyVersionState, version.state)),
                clean(version.hint),
                when(version.create_time),
                when(version.state_time),
                f"{clean(version.kek_backend)} v{version.kek_version}",
            )
            for version in kept.versions
        ],
    )


def _verdict(key: Key) -> str:
    newest = verdict_of(key)
    if newest == "UNREACHABLE":
        again = when(key.validation.retry_time)
        newest += f": {cause}" if (cause := unreachable_part(key)) else ""
        newest += f"; asked again at {again}" if again else ""
    if not newest or serving_verdict(key):
        return newest or "none yet"
    version = f"v{key.validation.version}"
    if newest == "INVALID":
        return f"{version} was rejected by the provider"
    return f"{newest} ({version})"


def key_row(key: Key) -> list[Text | str]:
    """Return the cells of a key in a list."""
    kept = key.provider_key
    return [
        key_id(key),
        provider_of(key),
        clean(kept.display_name),
        "managed" if kept.owner == OPERATOR else clean(kept.owner) or "-",
        state_text(key_state(key)),
        clean(kept.hint) or "-",
        (kept.state not in ENDED and serving_verdict(key)) or "-",
    ]


def print_change(session: Session, key: Key, what: str) -> None:
    """Print what became of a key."""
    if session.out.as_json:
        session.out.json(message_dict(key))
    else:
        session.out.print(f"{key_id(key)} ({label_of(key)}) is {what}")
