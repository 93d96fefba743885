"""How a review's diff becomes provider calls."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from byokeep.encoding import fields
from byokeep.runner.v1 import runner_pb2

from services.common import chunks as chunking
from services.common import diff
from services.common.chunks import Chunk
from services.common.diff import Diff
from services.common.models import Catalog
from services.llm_runner import prompt
from services.llm_runner.providers import FINDINGS_SCHEMA, ReviewPrompt

# Attention thins out over long inputs, and some providers' long prompts cost double; 2 MiB of
# diff still make fewer calls than the default ceiling of 20.
MAX_CHUNK_TOKENS: Final = 64_000
# Models that think by default count their thinking as output.
MAX_OUTPUT_TOKENS: Final = 32_000
_MARGIN_TOKENS: Final = 1_000


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
    """Divide the diff so that each call fits the model. Raises PlanError."""
    source = assign.input
    review = prompt.ReviewInput(
        repository=source.repository,
        title=source.title,
        description=source.description,
        guidance=source.guidance,
        context_files=tuple((file.path, file.content) for file in source.context_files),
    )
    limits = catalog.window(provider, assign.model)
    output = min(limits.max_output_tokens, MAX_OUTPUT_TOKENS)
    frame = prompt.build(review, Chunk(0, "", "", (), 0))
    overhead = sum(chunking.estimate_tokens(text) for text in frame) + _MARGIN_TOKENS
    room = min(limits.context_tokens - output - overhead, MAX_CHUNK_TOKENS)
    if room < chunking.MIN_CHUNK_TOKENS:
        raise PlanError(
            "Description, guidance and context files leave no room for the diff in this"
            " model's context; send less of them, or choose a model with a larger context."
        )
    failure = None
    try:
        parsed = diff.parse(source.diff)
    except diff.DiffError as error:
        failure = str(error)
    if failure is not None:
        raise PlanError(failure)
    salt = hashlib.sha256(fields(prompt.VERSION, provider, assign.model, *frame)).hexdigest()
    return Plan(assign.model, output, parsed, chunking.plan(parsed, room, salt=salt), review)
