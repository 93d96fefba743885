"""Files of the audit commands: exports and what they are held against, read and written."""

from __future__ import annotations

import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from byokeep.cli.base.errors import CliError, Exit
from byokeep.cli.base.text import clean

if TYPE_CHECKING:
    from byokeep.auditlog import Older
    from byokeep.profile import TrustBundle

# Blanks of one line only: `\s*` would begin anew at each of many empty lines.
_RECORD = re.compile(rb'(?m)^[ \t]*\{[ \t]*"(event|head)"|^byokeep/.+/audit$')
_T = TypeVar("_T")


@contextmanager
def target(output: Path | None) -> Iterator[TextIO]:
    """Open what is written to; a file only replaces an older one when it is whole."""
    if output is None:
        yield sys.stdout
        return
    if output.is_dir():
        raise CliError(f"{output} is a folder")
    try:
        # A name that nobody can foresee: a link that waits there is not followed.
        opened, scratch = tempfile.mkstemp(".part", f".{output.name}.", output.parent)
    except OSError as error:
        raise CliError(f"{output} can't be written: {error.strerror}") from None
    try:
        with open(opened, "w", encoding="utf-8") as file:
            yield file
        Path(scratch).replace(output)
    finally:
        Path(scratch).unlink(missing_ok=True)


def read(file: str, take: Callable[[Iterable[bytes]], _T], what: str = "an audit export") -> _T:
    """Give a file's chunks, or those of standard input, to a reader; return what it returns.

    `what` it should be is said of a file that is something else.

    Raises:
        CliError: the reader refuses it, and no line of it is of an export.
        VerificationError: the reader refuses an export.
    """
    from byokeep.auditlog import VerificationError, chunks_of

    with nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb") as stream:
        chunks = _Chunks(chunks_of(stream))
        try:
            return take(chunks)
        except VerificationError:
            if chunks.recognised():
                raise
    name = "standard input" if file == "-" else file
    raise CliError(f"{name} is not {what}", "byokeep audit export -o FILE writes an export")


def read_older(file: Path | None, bundle: TrustBundle) -> Older:
    """Return what an older export, saved checkpoint or signed note holds; nothing for no file."""
    from byokeep import auditlog

    if file is None:
        return auditlog.Older()
    trusted, broken = bundle.audit_log_keys, ""
    try:
        return read(
            str(file),
            lambda chunks: auditlog.read_older(_lines(chunks), trusted, bundle.deployment),
            "an older export, a checkpoint saved by byokeep audit checkpoint --save, or a signed"
            " note: nothing can be held against it",
        )
    except auditlog.UnpinnedKeyError:
        raise
    except auditlog.VerificationError as error:
        broken = str(error)
    raise CliError(
        f"{file}, the older file, does not hold: {broken}; nothing was held against it",
        "take another one that you kept",
        Exit.INTEGRITY,
        "AUDIT_BROKEN",
    )


def unpinned(key_id: str) -> CliError:
    """Return the error for what a key signed that the trust bundle lacks: nothing is known of it,
    so that it must not pass, and need not be tampering."""
    return CliError(
        f"not verified: it is signed by {clean(key_id)}, which this trust bundle does not pin",
        "get the current trust.json from your operator: python -m services.keyvault migrate prints"
        " every public key; compare before you pin it",
        Exit.INTEGRITY,
        "AUDIT_KEY_UNKNOWN",
        metadata={"key": clean(key_id)},
    )


class _Chunks:
    """Chunks of a file, and whether any line of it is of an export, whole or not."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._found = False

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._found = self._found or bool(_RECORD.search(chunk))
            yield chunk

    def recognised(self) -> bool:
        # One line that is altered must not make an export pass for another file.
        return self._found or any(map(_RECORD.search, self._chunks))


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    # With one end of line only: a byte that becomes another one is a change.
    for chunk in chunks:
        yield from (line.decode("utf-8", "replace") for line in io.BytesIO(chunk))
