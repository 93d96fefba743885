"""`make prove`, which has to fail when an attack gets through.

The whole of it runs in `.ci/run`; here, what breaks nothing.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from deploy.local.__main__ import main
from deploy.local.prove.attack import Attack, Group, NotShownError
from deploy.local.prove.run import GROUPS, attack_stack, chosen_groups
from deploy.local.state import throwaway_state
from deploy.local.supervisor import PORTS, LocalStack
from deploy.local.topology import Topology

# What the sabotage below lets through.
_LEFT_OUT = ("lease-as-auditor",)


@pytest.fixture(scope="module")
def sabotaged() -> Iterator[LocalStack]:
    """A stack whose keyvault takes an auditor for a runner as well."""
    with throwaway_state(in_memory=True) as state:
        right = Topology(state, dict.fromkeys(PORTS, 0))
        callers = right.environment("keyvault")["BYOKEEP_CALLERS"]
        callers += " runner=spiffe://byokeep.local/client/auditor"
        stack = LocalStack(state, extra={"keyvault": {"BYOKEEP_CALLERS": callers}})
        try:
            stack.start()
            yield stack
        finally:
            stack.stop(discard=True)


def _played(stack: LocalStack, groups: list[Group]) -> tuple[int, str]:
    said = io.StringIO()
    status = attack_stack(stack, groups, Console(file=said, width=200, markup=False))
    return status, said.getvalue()


def test_an_attack_that_gets_through_fails_the_round(sabotaged) -> None:
    """And says what got through; the attacks beside it are still stopped.

    Shown to fail with `refused` returning what it was answered.
    """
    status, said = _played(sabotaged, chosen_groups(["lease-as-auditor", "lease-as-developer"]))
    assert status == 1
    assert "✗ LeaseKey as the auditor" in said
    assert "GOT THROUGH: the call was answered with a LeaseKeyResponse" in said
    assert "2 attacks, 1 stopped" in said
    assert "not stopped: lease-as-auditor" in said


@pytest.mark.deep
@pytest.mark.timeout(300)
def test_all_else_is_stopped(sabotaged) -> None:
    """Every attack that does not break the stack."""
    names = [
        attack.name
        for group in GROUPS
        for attack in group.attacks
        if not attack.disruptive and attack.name not in _LEFT_OUT
    ]
    status, said = _played(sabotaged, chosen_groups(names))
    assert f"{len(names)} attacks, {len(names)} stopped" in said, said
    assert status == 0
    assert "✗" not in said


def _group(run) -> list[Group]:
    return [Group("made up", [Attack("made-up", "made up", "nothing", False, run)])]


def _raises(error: Exception):
    def run(attacker):
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "how"),
    [
        (_raises(NotShownError("the lights were out")), "NOT SHOWN: the lights were out"),
        (_raises(ValueError("a defect\nof the attack")), "NOT SHOWN: ValueError: a defect of"),
    ],
)
def test_what_shows_nothing_fails_the_round_too(sabotaged, run, how) -> None:
    """An attack that was not tried, or has a defect of its own."""
    status, said = _played(sabotaged, _group(run))
    assert status == 1
    assert how in said


def test_the_list_has_every_attack_once(capsys) -> None:
    assert main(["prove", "--list"]) == 0
    listed = capsys.readouterr().out
    names = [attack.name for group in GROUPS for attack in group.attacks]
    assert len(set(names)) == len(names)
    assert all(f"  {name} " in listed for name in names)


def test_an_unknown_attack_is_refused_before_anything_starts(capsys) -> None:
    assert main(["prove", "--only", "magic"]) == 1
    assert "no attack is called magic" in capsys.readouterr().err
