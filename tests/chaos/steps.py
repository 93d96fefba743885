"""The named steps of a key's and a review's life at which something is killed.

A step brings the stack to its moment and holds it there, so that the kill hits it: by the
emulator, which holds a call, or by SIGSTOP of the process that would go on. Steps that nothing can
hold (a request on its way) start it in a thread and kill a few milliseconds later.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from byokeep.ids import new_id
from byokeep.keyvault.v1 import custody_pb2
from byokeep.names import key_name
from byokeep.orchestrator.v1 import key_pb2

from tests.chaos.scene import Scene, active
from tests.harness import tenants

TARGETS: Final = ("orchestrator", "keyvault", "runner", "child", "postgres")


@dataclass
class Moment:
    """What a step left behind: its reviews, and what must be true in the end."""

    reviews: list[str] = field(default_factory=list)
    after: Callable[[], str] = lambda: ""


Step: TypeAlias = Callable[[Scene, random.Random], Any]


@contextmanager
def queued(scene: Scene, dice: random.Random) -> Iterator[Moment]:
    """A review waits in the queue, since the runner says nothing."""
    with scene.frozen("runner"):
        yield Moment([scene.submit(dice.choice(scene.tenants), "anthropic")])


@contextmanager
def leasing(scene: Scene, dice: random.Random) -> Iterator[Moment]:
    """An attempt runs, and keyvault does not answer its lease."""
    with scene.frozen("runner"):
        name = scene.submit(dice.choice(scene.tenants), "anthropic")
        held = contextlib.ExitStack()
        held.enter_context(scene.frozen("keyvault"))
    with held:
        with contextlib.suppress(TimeoutError):  # an orchestrator may need keyvault before
            scene.wait(lambda: scene.running(name), "the attempt did not start", 5.0)
        yield Moment([name])


@contextmanager
def calling(scene: Scene, dice: random.Random) -> Iterator[Moment]:
    """The provider has a call and has not answered it."""
    with _held(scene, ("hold",), "chat"):
        name = scene.submit(dice.choice(scene.tenants), "anthropic")
        scene.wait(lambda: scene.stack.emulator.held() == 1, "no call was made")
        yield Moment([name])


@contextmanager
def between_chunks(scene: Scene, dice: random.Random) -> Iterator[Moment]:
    """The first chunk is done, and the provider has the second."""
    with _held(scene, ("slow", "hold"), "chat"):
        name = scene.submit(dice.choice(scene.tenants), "anthropic", files=4)
        scene.wait(lambda: scene.stack.emulator.held() == 1, "no second call was made")
        yield Moment([name])


@contextmanager
def answering(scene: Scene, dice: random.Random) -> Iterator[Moment]:
    """The provider has answered, and the orchestrator has not heard."""
    with calling(scene, dice) as moment, scene.frozen("orchestrator"):
        scene.stack.emulator.release()
        time.sleep(0.3)
        yield moment


@contextmanager
def ending(scene: Scene, dice: random.Random) -> Iterator[Moment]:
    """The answer is on its way through runner and orchestrator."""
    with calling(scene, dice) as moment:
        scene.stack.emulator.release()
        time.sleep(dice.uniform(0.0, 0.05))
        yield moment


@contextmanager
def submitting(scene: Scene, dice: random.Random) -> Iterator[Moment]:
    """Reviews are on their way to the orchestrator."""
    moment = Moment()

    def submit() -> None:
        moment.reviews.append(scene.submit(dice.choice(scene.tenants), "anthropic"))

    with _meanwhile(submit, submit, submit):
        time.sleep(dice.uniform(0.0, 0.05))
        yield moment


@contextmanager
def taking_in(scene: Scene, dice: random.Random) -> Iterator[Moment]:
    """A sealed key is on its way into keyvault."""
    tenant = tenants.create(scene.stack, new_id("chaos").replace("_", "-"))
    request = tenants.add_request(scene.stack, tenant, "openai")
    with _meanwhile(lambda: scene.ask(lambda connection: connection.keys.AddKey(request))):
        time.sleep(dice.uniform(0.0, 0.06))
        yield Moment(after=_becomes_active(scene, tenant, request.key_id))


@contextmanager
def validating(scene: Scene, dice: random.Random) -> Iterator[Moment]:
    """A provider is asked about a new key, and has not answered."""
    tenant = tenants.create(scene.stack, new_id("chaos").replace("_", "-"))
    request = tenants.add_request(scene.stack, tenant, "anthropic")
    with _held(scene, ("hold",), "models"):
        scene.ask(lambda connection: connection.keys.AddKey(request))
        scene.wait(lambda: scene.stack.emulator.held() == 1, "the provider was not asked")
        yield Moment(after=_becomes_active(scene, tenant, request.key_id))


@contextmanager
def promoting(scene: Scene, dice: random.Random) -> Iterator[Moment]:
    """The provider has accepted a new key, and it becomes ACTIVE."""
    with validating(scene, dice) as moment:
        scene.stack.emulator.release()
        time.sleep(dice.uniform(0.0, 0.05))
        yield moment


@contextmanager
def revoking(scene: Scene, dice: random.Random) -> Iterator[Moment]:
    """A key is being revoked while a review runs on it."""
    tenant = tenants.create(scene.stack, new_id("chaos").replace("_", "-"))
    key_id = tenants.add_key(scene.stack, tenant, "openai")
    request = key_pb2.RevokeKeyRequest(name=key_name(tenant, key_id), request_id=new_id("req"))
    moment = Moment(after=lambda: _is_revoked(scene, tenant, key_id))
    with _meanwhile(lambda: scene.ask(lambda connection: connection.keys.RevokeKey(request))):
        time.sleep(dice.uniform(0.0, 0.05))
        yield moment


STEPS: Final[dict[str, Step]] = {
    step.__name__.replace("_", " "): step
    for step in (
        queued,
        leasing,
        calling,
        between_chunks,
        answering,
        ending,
        submitting,
        taking_in,
        validating,
        promoting,
        revoking,
    )
}


@contextmanager
def _held(scene: Scene, faults: tuple[str, ...], path: str) -> Iterator[None]:
    """Have the emulator strike anthropic's next calls with these faults; let go at the end."""
    for kind in faults:
        settings = {"seconds": 0.05} if kind == "slow" else {}
        scene.stack.emulator.fault(kind, provider="anthropic", path=path, **settings)
    try:
        yield
    finally:
        scene.stack.emulator.clear_faults()
        scene.stack.emulator.release()


@contextmanager
def _meanwhile(*works: Callable[[], Any]) -> Iterator[None]:
    """Do works in threads; at the end wait for them, and raise what one of them raised."""
    errors: list[Exception] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def _becomes_active(scene: Scene, tenant: str, key_id: str) -> Callable[[], str]:
    def after() -> str:
        try:
            scene.wait(
                lambda: active(scene.key(tenant, key_id)), "the key did not become ACTIVE", 120.0
            )
        except TimeoutError as error:
            return f"{tenant}: {error}: {scene.key(tenant, key_id)}"
        return ""

    return after


def _is_revoked(scene: Scene, tenant: str, key_id: str) -> str:
    state = scene.key(tenant, key_id).provider_key.state
    if state == custody_pb2.KEY_VERSION_STATE_REVOKED:
        return ""
    return f"{tenant}: revoked, and answered, and now {custody_pb2.KeyVersionState.Name(state)}"
