"""One bench for all tests of a module, as good as new for each."""

from __future__ import annotations

import pytest

from tests.component.runner.harness import running_bench, wait_for


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory):
    with running_bench(tmp_path_factory.mktemp("runner")) as bench:
        yield bench


@pytest.fixture
def bench(shared_bench):
    assert wait_for(lambda: not shared_bench.children)
    shared_bench.keyvault.reset()
    shared_bench.emulator.control.reset()
    return shared_bench
