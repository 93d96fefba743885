"""One attempt of a validation, in the child: the provider's model list, nothing else."""

from __future__ import annotations

from byokeep.orchestrator.v1 import key_pb2
from byokeep.runner.v1 import runner_pb2

from services.common.models import listed
from services.llm_runner import failures
from services.llm_runner.calls import Calls
from services.llm_runner.channel import ChildEnd, Kind
from services.llm_runner.providers import Adapter, Client, ProviderError


def run(channel: ChildEnd, calls: Calls, adapter: Adapter, client: Client) -> runner_pb2.Outcome:
    """Ask once, and send the verdict: who schedules validations also repeats them."""
    result = runner_pb2.ValidationResult(verdict=key_pb2.VALIDATION_VERDICT_VALID)
    try:
        result.models.extend(listed(calls.make("", lambda: adapter.list_models(client))))
    except ProviderError as error:
        result.verdict = failures.verdict(error)
        result.unreachable_cause = error.cause
    channel.send(Kind.VALIDATION_RESULT, result)
    return runner_pb2.Outcome()
