"""A process beside the event loop: does one job after the other, and ends with its parent.

A job is its name (1 byte), the length of its payload (4 bytes, big-endian) and the payload; an
answer is a status (1 byte), a length and a payload. Nothing here may import grpc.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import struct
import sys
from collections.abc import Callable
from typing import IO, Final

from byokeep.orchestrator.v1 import review_pb2, settings_pb2
from google.protobuf.message import Message

from services.common import hardening, logs
from services.common.diff import DiffError
from services.orchestrator.compute import exports, outline

log = logging.getLogger(__name__)
HEADER: Final = struct.Struct(">BI")
#: Before the diff: tokens of a call; or the length of the Settings that stand between.
BUDGET: Final = struct.Struct(">I")
#: Written once the door is closed; only then does the orchestrator send a job.
READY: Final = b"\n"
# Where cores are few, the orchestrator's own loop goes first.
_NICE: Final = 5


class Job(enum.IntEnum):
    """What is asked for: a diff's outline, the model that settings have for a diff's paths, or a
    review in one of the forms of an export."""

    OUTLINE = 0
    MODEL = 255
    TEXT = review_pb2.EXPORT_FORMAT_TEXT
    SARIF = review_pb2.EXPORT_FORMAT_SARIF
    GITHUB = review_pb2.EXPORT_FORMAT_GITHUB


class Status(enum.IntEnum):
    """How a job ended: with a message, a DiffError as JSON, or a defect, which is in the log."""

    DONE = 0
    REFUSED = 1
    FAILED = 2


_EXPORTS: Final[dict[Job, Callable[[review_pb2.Review], tuple[str, str]]]] = {
    Job.TEXT: exports.text,
    Job.SARIF: exports.sarif,
    Job.GITHUB: exports.github,
}


def do(job: Job, payload: bytes) -> Message:
    """Do one job. Raises DiffError."""
    if job is Job.OUTLINE:
        (budget,) = BUDGET.unpack_from(payload)
        return outline.outline(payload[BUDGET.size :], budget)
    if job is Job.MODEL:
        (length,) = BUDGET.unpack_from(payload)
        end = BUDGET.size + length
        settings = settings_pb2.Settings.FromString(payload[BUDGET.size : end])
        return outline.model(payload[end:], settings)
    review = review_pb2.Review.FromString(payload)
    review.findings.sort(key=lambda finding: (finding.path, finding.start_line))
    content, media_type = _EXPORTS[job](review)
    return review_pb2.ExportReviewResponse(content=content, media_type=media_type)


def _answer(job: Job, payload: bytes) -> tuple[Status, bytes]:
    try:
        return Status.DONE, do(job, payload).SerializeToString()
    except DiffError as error:
        refused = {"reason": error.reason, "message": str(error), "figures": error.figures}
        return Status.REFUSED, json.dumps(refused).encode()
    except Exception as error:
        logs.failure(log, "job_failed", error, job=job.name)
        return Status.FAILED, b""


def read_frame(stream: IO[bytes]) -> tuple[int, bytes]:
    """Return a frame's first byte and its payload. Raises EOFError where the other end is gone."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError
    first, length = HEADER.unpack(header)
    payload = stream.read(length)
    if len(payload) < length:
        raise EOFError
    return first, payload


def write_frame(stream: IO[bytes], first: int, payload: bytes) -> None:
    """Write one frame."""
    stream.write(HEADER.pack(first, len(payload)) + payload)
    stream.flush()


def main() -> None:
    """Do jobs until standard input ends."""
    hardening.close_the_door()
    os.nice(_NICE)
    logs.setup("orchestrator.compute", "info")
    logs.catch_all()
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    while True:
        try:
            job, payload = read_frame(sys.stdin.buffer)
        except EOFError:
            return
        write_frame(sys.stdout.buffer, *_answer(Job(job), payload))
        del payload


if __name__ == "__main__":
    main()
