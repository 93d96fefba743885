"""`python -m tests.chaos [--rounds N] [--seed S]`: kill each process at each step, and count.

A round takes one step and one process: other reviews run, the step's moment comes, the process is
killed (SIGKILL) and started again up to two seconds later. Then every review must end, or say what
it waits for; the calls that the emulator saw must be the calls that are stored; and none may have
been paid twice. All steps with all processes are 55 rounds; fewer take them in an order that the
seed decides. Exits with 1 where something did not hold, and leaves the logs in build/chaos.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import sys
import time
from pathlib import Path

from byokeep.testing import Stack

from tests.chaos.scene import Scene, Tally
from tests.chaos.steps import STEPS, TARGETS

_OUT = Path("build/chaos")
# Keys are taken in by the dozen here, by one caller.
_ENVIRONMENT = {
    "keyvault": {"BYOKEEP_INTAKE_PER_HOUR": "1000"},
    "orchestrator": {"BYOKEEP_INTAKE_PER_HOUR_OF_CALLER": "1000"},
}


def _round(scene: Scene, step: str, target: str, dice: random.Random) -> Tally:
    mark = scene.mark()
    reviews = [scene.submit(tenant) for tenant in scene.tenants for _ in range(2)]
    with STEPS[step](scene, dice) as moment:
        scene.kill(target)
        time.sleep(dice.uniform(0.0, 2.0))
        scene.revive(target)
    scene.wait_ready(target)
    tally = scene.settle([*reviews, *moment.reviews], mark)
    wrong = moment.after()
    if wrong:
        tally.wrong.append(wrong)
    return tally


def _rounds(count: int, dice: random.Random) -> list[tuple[str, str]]:
    """Each combination once before any comes again."""
    every = list(itertools.product(STEPS, TARGETS))
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        chosen += dice.sample(every, len(every))
    return chosen[:count]


def main() -> int:
    """Run the rounds; print a line each, and the tally."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("ROUNDS") or 20))
    parser.add_argument("--seed", type=int, default=None, help="of the order; printed")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().getrandbits(32)
    dice = random.Random(seed)
    print(f"{arguments.rounds} rounds, --seed {seed}", flush=True)
    total = Tally()
    with Stack(environment=_ENVIRONMENT) as stack:
        scene = Scene(stack)
        for number, (step, target) in enumerate(_rounds(arguments.rounds, dice), start=1):
            start = time.monotonic()
            tally = _round(scene, step, target, dice)
            total.add(tally)
            took = time.monotonic() - start
            print(f"{number:4} {step:15} {target:13} {took:5.1f} s  {tally}", flush=True)
            for wrong in tally.wrong:
                print(f"     WRONG: {wrong}", flush=True)
        if total.wrong:
            shutil.rmtree(_OUT, ignore_errors=True)
            shutil.copytree(stack.root / "logs", _OUT)
    print(f"in all: {total}")
    print(f"{len(total.wrong)} things did not hold" + (f"; logs: {_OUT}" if total.wrong else ""))
    return 1 if total.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
