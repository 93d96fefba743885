"""One attempt of a validation, in the child: the provider's model list, nothing else."""

from __future__ import annotations

import httpx
from byokeep.orchestrator.v1 import key_pb2
from byokeep.runner.v1 import runner_pb2

from services.llm_runner import failures
from services.llm_runner.calls import Calls
from services.llm_runner.channel import ChildEnd, Kind
from services.llm_runner.providers import Adapter, ProviderError


def run(
    channel: ChildEnd, calls: Calls, adapter: Adapter, client: httpx.Client
) -> runner_pb2.Outcome:
    """Ask once, and send the verdict: who schedules validations also repeats them."""
    models: tuple[str, ...] = ()
    verdict: key_pb2.ValidationVerdict.ValueType = key_pb2.VALIDATION_VERDICT_VALID
    try:
        models = calls.make("", lambda: adapter.list_models(client))
    except ProviderError as error:
        verdict = failures.verdict(error)
    channel.send(
        Kind.VALIDATION_RESULT, runner_pb2.ValidationResult(verdict=verdict, models=models)
    )
    return runner_pb2.Outcome()
