"""docs/simulate.py: against what is known in closed form, and docs/scaling.md against it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from docs import scaling
from docs.simulate import Events, Figures, Picker, Size, Station, simulate

PAGE = scaling.SVG.with_name("scaling.md").read_text()
TABLE = PAGE.partition("<!-- simulated: make simulate -->\n")[2].partition("\n\n")[0]


def _erlang_c(servers: int, load: float) -> float:
    """The probability that a job of an M/M/c queue waits (Erlang's C formula)."""
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(load**k / math.factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.6), (4, 2.8), (16, 13.0)])
def test_a_station_waits_as_an_mmc_queue_does(servers: int, load: float):
    """Mean stay of M/M/c: 1/µ + C(c, a) / (c·µ − λ), with µ = 1; and its use is a/c."""
    chance, events, stays = random.Random(7), Events(), []
    station = Station(events, servers, 1.0, chance)

    def arrive(left: int) -> None:
        begun = events.now
        station.do(lambda: stays.append(events.now - begun))
        if left:
            events.after(chance.expovariate(load), lambda: arrive(left - 1))

    arrive(100_000)
    events.run()
    expected = 1 + _erlang_c(servers, load) / (servers - load)
    assert sum(stays) / len(stays) == pytest.approx(expected, rel=0.03)
    assert station.use(events.now) == pytest.approx(load / servers, rel=0.03)


def test_the_picker_gives_lanes_in_turn_and_takes_longer_for_more_of_them():
    events, given = Events(), []
    picker = Picker(events, Figures(pick=1.0, pick_lane=0.1), places=2)
    for tenant in (1, 1, 1, 2):
        picker.wait(tenant, lambda tenant=tenant: given.append((tenant, round(events.now, 3))))
    events.run()
    # The first pick began when one lane was there; the others came while it was under way.
    assert given == [(1, 1.1), (2, 1.1)]
    picker.leave()
    events.run()
    assert given[2:] == [(1, 2.2)]


def test_places_are_what_littles_law_says():
    """Open attempts are rate × time, where nothing else is full."""
    size = Size("large", 64, 64, 64, 1000, 1000, 64, 64)
    figures = Figures(provider=1.0)
    result = simulate(size, 200.0, figures)
    time = figures.provider + figures.keyvault + figures.keyvault_database + figures.runner
    assert result.use["places"] * size.places == pytest.approx(200.0 * time, rel=0.05)
    assert result.use["orchestrators"] * 64 == pytest.approx(
        result.use["keyvaults"] * 64 * figures.orchestrator / figures.keyvault, rel=0.05
    )


def test_many_waiting_lanes_slow_the_pick():
    """Ten thousand tenants that wait, and a place now and then: the lock is what is full."""
    size = Size("few places", 4, 4, 4, 4, 4, 8, 8)
    short = Figures(provider=0.2)
    many = simulate(replace(size, tenants=10_000), 200, short)
    few = simulate(replace(size, tenants=10), 200, short)
    assert many.use["the pick"] > 0.6
    assert few.use["the pick"] < 0.4
    assert few.p99 < many.p99


def test_the_same_call_has_the_same_result():
    size = scaling.SIZES[0]
    assert simulate(size, 1.0) == simulate(size, 1.0)
    assert simulate(size, 1.0) != simulate(size, 1.0, seed=21)


def test_the_pages_table_is_what_is_simulated():
    """The cells that cost little; `make simulate` prints all of it."""
    for size in scaling.SIZES:
        (row,) = (line for line in TABLE.splitlines() if line.startswith(f"| {size.name} |"))
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        for rate, cell in zip(scaling.RATES[:4], cells, strict=False):
            assert scaling.cell(simulate(size, rate).p99) == cell


@pytest.mark.deep
@pytest.mark.timeout(600)
def test_the_page_and_its_picture_are_those_of_make_simulate(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "SVG", tmp_path / "scaling.svg")
    committed = scaling.Path(scaling.__file__).with_name("scaling.svg").read_text()
    scaling.main()
    assert capsys.readouterr().out.strip() == TABLE
    assert (tmp_path / "scaling.svg").read_text() == committed
