"""Carries attacks out in order, and says of each what stopped it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from deploy.local.background import show
from deploy.local.processes import StackError
from deploy.local.prove import (
    audit,
    edges,
    grants,
    identity,
    intake,
    leases,
    network,
    restore,
    rows,
    traces,
)
from deploy.local.prove.attack import Attack, GotThroughError, Group, NotShownError
from deploy.local.prove.attacker import Attacker
from deploy.local.state import throwaway_state
from deploy.local.supervisor import LocalStack

# What breaks something comes last.
GROUPS = (
    rows.GROUP,
    identity.GROUP,
    grants.GROUP,
    leases.GROUP,
    intake.GROUP,
    edges.GROUP,
    traces.GROUP,
    network.GROUP,
    audit.GROUP,
    restore.GROUP,
)
_WIDTH = 56


def listing() -> int:
    """Print every attack's name and what it is."""
    console = _console()
    for group in GROUPS:
        console.print(Text(group.title, style="bold"))
        for attack in group.attacks:
            console.print(f"  {attack.name:<32}{attack.what}", soft_wrap=True)
    return 0


def run(only: Sequence[str]) -> int:
    """Attack a throwaway stack; return 0 where every attack was stopped, else 1.

    ``only`` names attacks; none: all. Raises StackError if the stack doesn't start, or for
    a name that is none.
    """
    chosen = chosen_groups(only)
    console = _console()
    with throwaway_state(in_memory=True) as state:
        console.print(f"starting a throwaway stack in {state.root}")
        stack = LocalStack(state, report=show)
        try:
            stack.start()
            return attack_stack(stack, chosen, console)
        finally:
            stack.stop(discard=True)


def chosen_groups(only: Sequence[str]) -> list[Group]:
    """The groups with the attacks of these names alone; no name: all of them.

    Raises StackError for a name that is none.
    """
    known = {attack.name for group in GROUPS for attack in group.attacks}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise StackError(f"no attack is called {unknown[0]}; make prove ONLY=list names them")
    groups = (
        Group(group.title, [one for one in group.attacks if not only or one.name in only])
        for group in GROUPS
    )
    return [group for group in groups if group.attacks]


def attack_stack(stack: LocalStack, groups: Sequence[Group], console: Console) -> int:
    """Attack a stack that serves; print each attack; return 0 or 1."""
    with Attacker(stack) as attacker:
        return _Round(attacker, console).play(groups)


class _Round:
    """One round of attacks: what was stopped, what was not."""

    def __init__(self, attacker: Attacker, console: Console) -> None:
        self._attacker = attacker
        self._console = console
        self._stopped = 0
        self._through: list[Attack] = []

    def play(self, groups: Sequence[Group]) -> int:
        """Carry all of them out."""
        started = time.monotonic()
        for group in groups:
            self._group(group)
        count = self._stopped + len(self._through)
        attacks = "1 attack" if count == 1 else f"{count} attacks"
        text = f"{attacks}, {self._stopped} stopped, in {time.monotonic() - started:.0f} s"
        self._console.print()
        if self._through:
            names = ", ".join(attack.name for attack in self._through)
            self._print(Text(f"{text}; not stopped: {names}", style="bold red"))
            return 1
        self._print(Text(text, style="bold green"))
        return 0

    def _group(self, group: Group) -> None:
        self._console.print()
        self._console.print(Text(group.title, style="bold"))
        holds = ""
        for attack in group.attacks:
            if attack.holds != holds:
                holds = attack.holds
                self._print(Text(f"  attacker holds: {holds}", style="dim"))
            self._attack(attack)

    def _attack(self, attack: Attack) -> None:
        try:
            outcome = attack.run(self._attacker)
        except Exception as error:
            self._failed(attack, error)
            return
        self._passed(attack, outcome)

    def _passed(self, attack: Attack, how: str) -> None:
        self._stopped += 1
        self._say("✓", "green", attack, how)

    def _failed(self, attack: Attack, error: Exception) -> None:
        self._through.append(attack)
        if isinstance(error, GotThroughError):
            how = f"GOT THROUGH: {error}"
        elif isinstance(error, NotShownError):
            how = f"NOT SHOWN: {error}"
        else:
            how = f"NOT SHOWN: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
        self._say("✗", "bold red", attack, how)

    def _say(self, mark: str, style: str, attack: Attack, how: str) -> None:
        line = Text("  ")
        line.append(mark, style=style)
        line.append(f" {attack.what:<{_WIDTH}} ")
        line.append(how, style=style if mark == "✗" else "cyan")
        self._print(line)

    def _print(self, line: Text) -> None:
        # Where nobody looks at a terminal, one line stays one line.
        self._console.print(line, soft_wrap=not self._console.is_terminal)


def _console() -> Console:
    # NO_COLOR is rich's to obey.
    return Console(markup=False, highlight=False, emoji=False)
