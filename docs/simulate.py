"""Reviews as they pass the parts of a byokeep of some size: a discrete-event simulation.

Each part takes the time that was measured (docs/scaling.md says where). A part is a station:
servers, a queue, a time that is spread exponentially around its mean. The picker is different: it
is one for all replicas, gives as many places as are free, and takes longer the more lanes wait.
Seeded: the same call has the same result.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

BENDS_AT = 1.0
"""Where it bends: seconds that byokeep adds to the provider's time for one review of a hundred."""
_MOST, _SECONDS = 30_000, 40.0
_SEED = 20


@dataclass(frozen=True, slots=True)
class Figures:
    """What a review costs each part, in seconds; decision 0011's middle of what was measured."""

    orchestrator: float = 0.014
    keyvault: float = 0.0085
    runner: float = 0.0255  # the child 18.5 ms, its parent 7
    orchestrator_database: float = 0.006
    keyvault_database: float = 0.003
    pick: float = 0.0012
    pick_lane: float = 0.0000288  # 30 ms in 1,000 lanes (decision 0002)
    provider: float = 10.0  # a guess: the model's, not ours


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is of each part. A process of ours uses one core."""

    name: str
    orchestrators: int = 1
    keyvaults: int = 1
    runners: int = 1
    children: int = 16
    concurrency: int = 32
    runner_cores: int = 2
    database_cores: int = 2
    tenants: int = 10_000
    partitions: int = 1

    @property
    def places(self) -> int:
        """Attempts that may be open at once: what orchestrators and runners both allow."""
        return min(self.orchestrators * self.concurrency, self.runners * self.children)


class Events:
    """A clock, and what is to be done when."""

    def __init__(self) -> None:
        """It begins at 0."""
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._heap, (self.now + seconds, next(self._order), do))

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._heap:
            self.now, _, do = heapq.heappop(self._heap)
            do()


class Station:
    """Servers with one queue: first come, first served."""

    def __init__(self, events: Events, servers: int, mean: float, chance: random.Random) -> None:
        """``mean`` is a job's time in seconds."""
        self._events, self._servers, self._mean, self._chance = events, servers, mean, chance
        self._waiting: deque[Callable[[], None]] = deque()
        self._serving = 0
        self.busy = 0.0

    def do(self, then: Callable[[], None]) -> None:
        """Serve a job, and go on with `then`."""
        if self._serving == self._servers:
            self._waiting.append(then)
            return
        self._serving += 1
        took = self._chance.expovariate(1 / self._mean)
        self.busy += took

        def end() -> None:
            self._serving -= 1
            if self._waiting:
                self.do(self._waiting.popleft())
            then()

        self._events.after(took, end)

    def use(self, seconds: float) -> float:
        """The share of its servers' time that was used."""
        return self.busy / (seconds * self._servers)


@dataclass(slots=True)
class Picker:
    """Gives places to lanes in turn, one pick at a time."""

    events: Events
    figures: Figures
    places: int
    lanes: OrderedDict[int, deque[Callable[[], None]]] = field(default_factory=OrderedDict)
    picking: bool = False
    busy: float = 0.0

    def wait(self, tenant: int, then: Callable[[], None]) -> None:
        """Go on with `then` once there is a place; `leave` gives it back."""
        self.lanes.setdefault(tenant, deque()).append(then)
        self._pick()

    def leave(self) -> None:
        """Give a place back."""
        self.places += 1
        self._pick()

    def _pick(self) -> None:
        if self.picking or not self.places or not self.lanes:
            return
        self.picking = True
        took = self.figures.pick + self.figures.pick_lane * len(self.lanes)
        self.busy += took
        self.events.after(took, self._give)

    def _give(self) -> None:
        self.picking = False
        while self.places and self.lanes:
            tenant, lane = self.lanes.popitem(last=False)
            self.places -= 1
            lane.popleft()()
            if lane:
                self.lanes[tenant] = lane  # behind the others
        self._pick()


@dataclass(frozen=True, slots=True)
class Result:
    """What reviews of one rate met: added seconds (middle, hundredth), and how much of each part
    was used while they came."""

    p50: float
    p99: float
    use: dict[str, float]

    @property
    def fullest(self) -> str:
        """The part that was used most."""
        return max(self.use, key=lambda name: self.use[name])


def simulate(size: Size, rate: float, figures: Figures = Figures(), seed: int = _SEED) -> Result:
    """Send reviews at a rate into a deployment; partitions share them, so one is looked at."""
    rate /= size.partitions
    chance, events = random.Random(seed), Events()  # noqa: S311 it is a simulation

    def station(servers: int, mean: float) -> Station:
        return Station(events, servers, mean, chance)

    parts = {
        "orchestrators": station(size.orchestrators, figures.orchestrator / 2),
        "their database": station(size.database_cores, figures.orchestrator_database / 2),
        "keyvaults": station(size.keyvaults, figures.keyvault),
        "keyvault's database": station(size.database_cores, figures.keyvault_database),
        "runners": station(size.runners * size.runner_cores, figures.runner),
    }
    places = size.places
    picker = Picker(events, figures, places)
    added, use, held = list[float](), dict[str, float](), 0.0

    def submit(tenant: int) -> None:
        begun, thinks = events.now, chance.expovariate(1 / figures.provider)
        taken = 0.0

        def picked() -> None:
            nonlocal taken
            taken = events.now
            through(("keyvaults", "keyvault's database", "runners"), ask)

        def ask() -> None:
            events.after(thinks, lambda: through(("their database", "orchestrators"), end))

        def end() -> None:
            nonlocal held
            held += min(events.now, last) - min(taken, last)
            added.append(events.now - begun - thinks)
            picker.leave()

        through(("orchestrators", "their database"), lambda: picker.wait(tenant, picked))

    def through(names: Iterable[str], then: Callable[[], None]) -> None:
        first, *others = names
        parts[first].do(lambda: through(others, then) if others else then())

    def note() -> None:
        use.update({name: part.use(last) for name, part in parts.items()})
        use["the pick"] = picker.busy / last

    at, last = 0.0, min(_SECONDS, _MOST / rate)
    tenants = max(1, size.tenants // size.partitions)
    while (at := at + chance.expovariate(rate)) < last:
        events.after(at, functools.partial(submit, chance.randrange(tenants)))
    events.after(last, note)
    events.run()
    added.sort()
    use["places"] = held / (last * places)
    return Result(added[len(added) // 2], added[int(len(added) * 0.99)], use)


def bend(size: Size, figures: Figures = Figures()) -> tuple[float, Result]:
    """Return the rate up to which one review of a hundred is delayed by less than BENDS_AT, within
    a tenth, and what reviews meet a quarter above it."""
    low, high = 0.1, 10_000.0
    while high / low > 1.1:
        middle = (low * high) ** 0.5
        if simulate(size, middle, figures).p99 < BENDS_AT:
            low = middle
        else:
            high = middle
    return low, simulate(size, low * 1.25, figures)
