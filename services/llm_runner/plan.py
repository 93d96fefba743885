"""How a review's diff becomes provider calls."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from byokeep.encoding import fields
from byokeep.runner.v1 import runner_pb2

from services.common import chunks as chunking
from services.common import diff
from services.common.chunks import Chunk
from services.common.diff import Diff
from services.common.models import Catalog
from services.llm_runner import prompt
from services.llm_runner.providers import FINDINGS_SCHEMA, ReviewPrompt


class PlanError(Exception):
    """The review can't be divided into calls; the text says why, without its content."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The calls of one review."""

    model: str
    max_output_tokens: int
    diff: Diff = field(repr=False)
    chunks: tuple[Chunk, ...] = field(repr=False)
    _input: prompt.ReviewInput = field(repr=False)

    def prompt(self, chunk: Chunk) -> ReviewPrompt:
        """Return the call for one chunk."""
        system, user = prompt.build(self._input, chunk)
        return ReviewPrompt(
            model=self.model,
            system=system,
            user=user,
            schema=FINDINGS_SCHEMA,
            max_output_tokens=self.max_output_tokens,
        )


def plan(assign: runner_pb2.Assign, provider: str, catalog: Catalog) -> Plan:
    """Divide the diff so that each call fits the model, or that which its done chunks were made
    for. Raises PlanError."""
    source = assign.input
    review = prompt.ReviewInput(
        repository=source.repository,
        title=source.title,
        description=source.description,
        guidance=source.guidance,
        context_files=tuple((file.path, file.content) for file in source.context_files),
    )
    planned_for = assign.plan_model or assign.model
    limits = catalog.window(provider, planned_for)
    frame = prompt.build(review, Chunk(0, "", "", (), 0))
    failure = ""
    try:
        room = chunking.room(limits, sum(chunking.estimate_tokens(text) for text in frame))
        parsed = diff.parse(source.diff)
    except (chunking.NoRoomError, diff.DiffError) as error:
        failure = str(error)
    if failure:
        raise PlanError(failure)
    salt = hashlib.sha256(fields(prompt.VERSION, provider, planned_for, *frame)).hexdigest()
    return Plan(
        assign.model,
        chunking.output_tokens(catalog.window(provider, assign.model)),
        parsed,
        chunking.plan(parsed, room, salt=salt),
        review,
    )
