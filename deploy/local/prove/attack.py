"""What an attack is, and how one says that it was stopped, or what got through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from byokeep.errors import error_info

if TYPE_CHECKING:
    from deploy.local.prove.attacker import Attacker


class GotThroughError(Exception):
    """An attack was not stopped; the text says exactly what got through."""


class NotShownError(Exception):
    """Something else stood in the way, so that an attack shows nothing; the text says what."""


Run = Callable[["Attacker"], str]


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack. ``run`` returns what stopped it; ``holds`` is what the attacker is given.

    ``disruptive``: the stack is not whole afterwards, or not while it runs.
    """

    name: str
    what: str
    holds: str
    disruptive: bool
    run: Run


@dataclass(frozen=True, slots=True)
class Group:
    """Attacks of one kind, in the order in which they run."""

    title: str
    attacks: list[Attack] = field(default_factory=list)

    def attack(self, what: str, *, holds: str, disruptive: bool = False) -> Callable[[Run], Run]:
        """Register a function as this group's next attack, under its own name."""

        def register(run: Run) -> Run:
            name = run.__name__.replace("_", "-")
            self.attacks.append(Attack(name, what, holds, disruptive, run))
            return run

        return register


def refused(call: Callable[[], object], *reasons: str) -> str:
    """Make a call that has to be refused for one of these reasons; return how it was.

    Raises GotThroughError where it is answered, and NotShownError where it is refused for
    another reason: then the protection was not reached.
    """
    try:
        answer = call()
    except grpc.RpcError as error:
        info = error_info(error)
    else:
        raise GotThroughError(f"the call was answered with a {type(answer).__name__}")
    if info.reason not in reasons:
        raise NotShownError(
            f"refused with {info.code.name} {info.reason} ({info.message}),"
            f" where {' or '.join(reasons)} was expected"
        )
    return f"{info.code.name} {info.reason}"
