"""Strict parser for unified diffs as `git diff`, `git show`, `git format-patch` or `diff -u` print.

Written here rather than taken from a library: unidiff 1.0.1 leaves C-quoted paths undecoded, takes
two lines of mail text for a file header and cuts a path at " b/"; whatthepatch 1.0.7 asserts on a
binary patch and reads a mail signature as a change. Format: git-diff(1), "Generating patch text
with -p"; GNU diffutils, "Detailed Description of Unified Format".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Reason = Literal[
    "DIFF_EMPTY",
    "DIFF_NOT_A_DIFF",
    "DIFF_NOT_UTF8",
    "DIFF_MALFORMED",
    "DIFF_TOO_LARGE",
]
Status = Literal["added", "deleted", "modified", "renamed", "copied", "mode"]
Unread = Literal["BINARY", "SUBMODULE", "POINTER", "NOT_SHOWN"]
"""Why nobody can read a file in its diff: it is binary, a commit of another repository, a pointer
of Git LFS or git-annex to content that is kept elsewhere, or only named."""

MAX_PATH_BYTES: Final = 1024
"""Longest path taken, in UTF-8 bytes: a path is repeated in every chunk that shows its file."""
MAX_LINES: Final = 100_000
"""Most lines taken: a parsed line takes some 200 bytes, however short it is."""

_DEV_NULL: Final = "/dev/null"
_HUNK: Final = re.compile(
    r"@@ -([0-9]{1,9})(?:,([0-9]{1,9}))? \+([0-9]{1,9})(?:,([0-9]{1,9}))? @@ ?(.*)", re.DOTALL
)
_MOVED: Final = re.compile(r"((?:rename|copy) (?:from|to)) (.*)", re.DOTALL)
_MODE: Final = re.compile(
    r"(old mode|new mode|new file mode|deleted file mode|index)(?: [0-9a-f]+\.\.[0-9a-f]+)?"
    r" ([0-7]{6})"
)
_INDEX: Final = ("index ", "similarity index ", "dissimilarity index ")
_MOVES: Final[tuple[tuple[str, Status], ...]] = (("rename", "renamed"), ("copy", "copied"))
# What `git diff --submodule=log` and `diff -r` print in place of a change's text.
_SUBMODULE: Final = re.compile(r"Submodule (.+) [0-9a-f]{7,64}\.{2,3}[0-9a-f]{7,64}\b.*")
_ONLY_IN: Final = re.compile(r"Only in ([^:]+): (.+)")
_UNMERGED: Final = "* Unmerged path "
_COMMIT_OF_SUBMODULE: Final = re.compile(r"Subproject commit [0-9a-f]{40,64}(-dirty)?")
# The line that changes in each pointer of Git LFS that comes to mean something else. Its first may
# have other names, come after blank lines, end in CR (git-lfs, lfs/pointer.go: DecodeFrom).
_LFS_POINTER: Final = "oid sha256:"
# What git-annex keeps in git: a symbolic link into .git, or this, where the file is unlocked.
_ANNEX_POINTER: Final = re.compile(r"(?:(?:\.\./)*\.git(?:/.*)?)?/annex/objects/.+")
# A path that leads out of the tree: absolute, of a drive, a URL, or with a part that git refuses.
_OUTSIDE: Final = re.compile(r"/|[A-Za-z]:[/\\]|[A-Za-z][A-Za-z0-9+.-]*://|(?:.*/)?\.{0,2}(?:/|$)")
# An undecodable byte is kept, as what it is in Latin-1.
_BYTES: Final = {0xDC00 + byte: chr(byte) for byte in range(0x80, 0x100)}
_ESCAPE: Final = re.compile(rb'\\([0-7]{3}|[abfnrtv"\\])')
_ESCAPES: Final = dict(zip(b'abfnrtv"\\', b'\a\b\f\n\r\t\v"\\', strict=True))


class DiffError(ValueError):
    """The input can't be reviewed as a diff.

    `reason` is stable and goes to callers; the message is a sentence that a person can act on. It
    names a line number at most, and never holds text of the diff. `figures` has what was counted
    and the limit that it is over.
    """

    def __init__(self, reason: Reason, message: str, **figures: int) -> None:
        """Keep the reason and the figures beside the message."""
        super().__init__(message)
        self.reason: Final = reason
        self.figures: Final = figures


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a hunk; numbers count from 1, and are None on the side that lacks the line.

    `text` has neither sign nor newline, but keeps a carriage return. `no_newline` says that the
    file ends in this line without a newline.
    """

    kind: Literal["+", "-", " "]
    old_no: int | None
    new_no: int | None
    text: str
    no_newline: bool


@dataclass(frozen=True, slots=True)
class Hunk:
    """One run of changed lines with context; `section` is the text after the second `@@`."""

    old_start: int
    old_len: int
    new_start: int
    new_len: int
    section: str
    lines: tuple[Line, ...]

    @property
    def new_lines(self) -> range:
        """Line numbers that the hunk covers in the new file; empty if it only deletes."""
        return range(self.new_start, self.new_start + self.new_len)

    @property
    def old_lines(self) -> range:
        """Line numbers that the hunk covers in the old file; empty if it only adds."""
        return range(self.old_start, self.old_start + self.old_len)


@dataclass(frozen=True, slots=True)
class FileDiff:
    """The change of one file.

    Paths carry no `a/` or `b/`; an unprintable character in one is shown as `\\uXXXX`, and a byte
    that isn't UTF-8 as `\\xXX`, so that a path is always one harmless line. `old_path` is None for
    an added file, `new_path` for a deleted one. Modes are octal strings where the diff states them.
    """

    old_path: str | None
    new_path: str | None
    status: Status
    hunks: tuple[Hunk, ...]
    unread: Unread | None
    old_mode: str | None
    new_mode: str | None

    @property
    def path(self) -> str:
        """The path that reviews name: the new one, or the old one of a deleted file."""
        return self.new_path or self.old_path or ""


@dataclass(frozen=True, slots=True)
class Diff:
    """Every file of a diff, in the diff's order; a path may occur twice in a patch series."""

    files: tuple[FileDiff, ...]

    def reviewable_lines(self, path: str) -> frozenset[int]:
        """Numbers of the added and context lines of `path` in the new file; empty if unknown."""
        return frozenset(
            number
            for file in self.files
            if file.new_path == path
            for hunk in file.hunks
            for number in hunk.new_lines
        )


def parse(diff: str | bytes) -> Diff:
    """Parse a diff of at least one file.

    Lines end at a newline and nowhere else: carriage returns, form feeds and Unicode separators
    belong to the content. Bytes that aren't UTF-8 are read as Latin-1 inside hunks. Raises
    `DiffError`, and nothing else, for every input that can't be used.
    """
    text = _decode(diff)
    if not text.strip():
        raise DiffError("DIFF_EMPTY", "The diff is empty; compare two commits that differ.")
    files = _Parser(text).run()
    if not files:
        raise DiffError(
            "DIFF_NOT_A_DIFF",
            "No file of a unified diff was found; send the output of 'git diff --no-color', of a"
            " merge that of 'git show -m --first-parent'.",
        )
    return Diff(files)


def _decode(diff: str | bytes) -> str:
    """Text without byte order mark and NUL; a byte that isn't UTF-8 is a lone surrogate."""
    data = diff.encode("utf-8", "surrogatepass") if isinstance(diff, str) else diff
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DiffError(
            "DIFF_NOT_UTF8",
            "The diff is UTF-16, as PowerShell's '>' writes it; use 'git diff --output=FILE'.",
        )
    if data.count(b"\0") * 10 > len(data):
        raise DiffError("DIFF_NOT_A_DIFF", "The input is binary data, not a diff.")
    lines = data.count(b"\n")
    if lines > MAX_LINES:
        raise DiffError(
            "DIFF_TOO_LARGE",
            f"The diff has {lines} lines and at most {MAX_LINES} are taken; review it in parts.",
            lines=lines,
            max_lines=MAX_LINES,
        )
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


@dataclass(slots=True)
class _Draft:
    """A file while its header is being read."""

    number: int
    names: tuple[str, str] | None
    extended: dict[str, str]
    hunks: list[Hunk]
    unread: Unread | None = None
    closed: bool = False

    def finish(self) -> FileDiff | None:
        """Settle paths and status; None if this was mail text that begins like a header."""
        said = self.extended
        names: tuple[str | None, str | None] | None = self.names
        status: Status = "modified"
        for verb, moved in _MOVES:
            if f"{verb} from" in said and f"{verb} to" in said:
                names, status = (said[f"{verb} from"], said[f"{verb} to"]), moved
        if names is None:
            if not (said or self.hunks or self.unread):
                return None
            raise _malformed(self.number, "the file's paths can't be told apart")
        old, new = names
        if not all(0 < len((path or "").encode()) <= MAX_PATH_BYTES for path in names):
            raise _malformed(self.number, f"a path is not 1 to {MAX_PATH_BYTES} bytes long")
        if any(path != _DEV_NULL and _OUTSIDE.match(path or "") for path in names):
            raise _malformed(self.number, "a path is absolute, a URL, or leads out of the tree")
        if "new file mode" in said or old == _DEV_NULL:
            old, status = None, "added"
        elif "deleted file mode" in said or new == _DEV_NULL:
            new, status = None, "deleted"
        elif status == "modified" and "new mode" in said and not (self.hunks or self.unread):
            status = "mode"
        return FileDiff(
            old,
            new,
            status,
            tuple(self.hunks),
            self.unread or _unread(self.hunks),
            said.get("old mode") or said.get("deleted file mode") or said.get("index"),
            said.get("new mode") or said.get("new file mode") or said.get("index"),
        )


class _Parser:
    """State machine over the lines; hunks are read by their stated lengths, never by look."""

    def __init__(self, text: str) -> None:
        self._lines: Sequence[str] = text.removesuffix("\n").split("\n")
        self._by_git = text.startswith("diff --git ") or "\ndiff --git " in text
        self._at = 0
        self._draft: _Draft | None = None
        self._files: list[FileDiff] = []

    def run(self) -> tuple[FileDiff, ...]:
        after_hunk = False
        while self._at < len(self._lines):
            line = self._line(self._at)
            if line.startswith("diff --git "):
                self._begin(self._git_names(line.removeprefix("diff --git ")))
            elif line.startswith(("diff --cc ", "diff --combined ")):
                raise _malformed(self._at + 1, "a merge's combined diff has no single old side")
            elif line.startswith("--- ") and self._plain_header():
                continue
            elif line.startswith("@@ -"):
                self._hunk(line)
                after_hunk = True
                continue
            elif after_hunk and line.startswith(("+", "-", " ")) and line.strip() != "--":
                raise _malformed(self._at + 1, "the hunk is longer than its header says")
            else:
                self._header_line(line)
            after_hunk = False
            self._at += 1
        self._end()
        return tuple(self._files)

    def _line(self, index: int) -> str:
        """A header line: a diff that was saved with CRLF has a carriage return there."""
        return self._lines[index].removesuffix("\r") if index < len(self._lines) else ""

    def _begin(self, names: tuple[str, str] | None) -> None:
        self._end()
        self._draft = _Draft(self._at + 1, names, {}, [])

    def _end(self) -> None:
        file = self._draft.finish() if self._draft is not None else None
        if file is not None:
            self._files.append(file)
        self._draft = None

    def _header_line(self, line: str) -> None:
        """Take an extended header; everything else (mail text, index line, base85) is noise."""
        draft = self._draft
        binary = line.startswith("Binary files ") and line.endswith(" differ")
        if binary and not self._by_git and (draft is None or draft.hunks):
            old, _, new = line[len("Binary files ") : -len(" differ")].partition(" and ")
            self._begin(_common(self._path(old), self._path(new)))
            draft = self._draft
        elif line.startswith(_UNMERGED):
            raise _malformed(self._at + 1, "a path is unmerged, and its change not shown")
        elif match := _SUBMODULE.fullmatch(line):
            self._named(self._path(match[1]), "SUBMODULE")
            return
        elif not self._by_git and (match := _ONLY_IN.fullmatch(line)):
            folder = match[1].partition("/")[2]
            self._named(self._path(f"{folder}/{match[2]}").lstrip("/"), "NOT_SHOWN")
            return
        if draft is None or draft.hunks or draft.closed:
            return
        if binary or line == "GIT binary patch":
            draft.unread, draft.closed = "BINARY", True
        elif match := _MOVED.fullmatch(line):
            draft.extended[match[1]] = self._path(match[2])
        elif match := _MODE.fullmatch(line):
            draft.extended[match[1]] = match[2]
        else:
            draft.closed = not line.startswith(_INDEX)

    def _named(self, path: str, why: Unread) -> None:
        """Take a file that is only named."""
        self._begin((path, path))
        if self._draft is not None:
            self._draft.unread, self._draft.closed = why, True
        self._end()

    def _plain_header(self) -> bool:
        """Take `---` and `+++` if a hunk follows; mail text may have such lines as well."""
        new_line = self._line(self._at + 1)
        if not (new_line.startswith("+++ ") and _HUNK.fullmatch(self._line(self._at + 2))):
            return False
        old = self._path(self._line(self._at)[4:].partition("\t")[0])
        new = self._path(new_line[4:].partition("\t")[0])
        if self._draft is None or self._draft.hunks or self._draft.closed:
            self._begin(_common(old, new))
        elif self._draft.names is None or _DEV_NULL in (old, new):
            known_old, known_new = self._draft.names or _common(old, new)
            self._draft.names = (
                old if old == _DEV_NULL else known_old,
                new if new == _DEV_NULL else known_new,
            )
        self._at += 2
        return True

    def _hunk(self, header: str) -> None:
        match = _HUNK.fullmatch(header)
        if match is None:
            raise _malformed(self._at + 1, "the hunk header can't be read")
        if self._draft is None:
            raise _malformed(self._at + 1, "a hunk comes before any file header")
        start = self._at + 1
        old_start, new_start = int(match[1]), int(match[3])
        old_len, new_len = int(match[2] or 1), int(match[4] or 1)
        if (old_len and not old_start) or (new_len and not new_start):
            raise _malformed(start, "a file's first line is 1, not 0")
        lines = self._hunk_lines((old_start, old_len), (new_start, new_len), start)
        section = match[5].translate(_BYTES)
        self._draft.hunks.append(Hunk(old_start, old_len, new_start, new_len, section, lines))

    def _hunk_lines(
        self, old_side: tuple[int, int], new_side: tuple[int, int], header_number: int
    ) -> tuple[Line, ...]:
        old, old_end = old_side[0], sum(old_side)
        new, new_end = new_side[0], sum(new_side)
        lines: list[Line] = []
        source, at, count = self._lines, self._at + 1, len(self._lines)
        while old < old_end or new < new_end:
            if at >= count:
                raise _malformed(header_number, "the diff ends inside this hunk")
            raw = source[at]
            if raw in ("", "\r"):
                # Mailers strip the blank of an empty context line; git apply takes that as well.
                raw = " " + raw
            if not raw.isascii():
                raw = raw.translate(_BYTES)
            kind = raw[0]
            at += 1
            no_newline = at < count and source[at].startswith("\\")
            if kind == "+" and new < new_end:
                lines.append(Line("+", None, new, raw[1:], no_newline))
            elif kind == "-" and old < old_end:
                lines.append(Line("-", old, None, raw[1:], no_newline))
            elif kind == " " and old < old_end and new < new_end:
                lines.append(Line(" ", old, new, raw[1:], no_newline))
            else:
                raise _malformed(at, "the line doesn't fit its hunk's stated lengths")
            old += kind != "+"
            new += kind != "-"
            at += no_newline
        self._at = at
        return tuple(lines)

    def _git_names(self, rest: str) -> tuple[str, str] | None:
        """Both paths of a `diff --git` line, or None if only the lines below can tell.

        Paths may hold spaces, but where no rename follows both are equal but for their prefix, so
        that the line splits in its middle.
        """
        middle, even = len(rest) // 2, len(rest) % 2 == 0
        if even or rest[middle] != " ":
            return None
        old, new = self._path(rest[:middle]), self._path(rest[middle + 1 :])
        common = _common(old, new)
        return common if common[0] == common[1] else None

    def _path(self, raw: str) -> str:
        """A path without quotes; see `FileDiff` for what becomes of unprintable characters."""
        if len(raw) > 1 and raw.startswith('"') and raw.endswith('"'):
            raw = _unquote(raw[1:-1])
        return "".join(c if c.isprintable() else _escaped(ord(c)) for c in raw)


def _escaped(code: int) -> str:
    return f"\\x{ord(_BYTES[code]):02x}" if code in _BYTES else f"\\u{code:04x}"


def _common(old: str, new: str) -> tuple[str, str]:
    """Drop the first folder of both if only it differs: `a/` and `b/`, `i/` and `w/`, any other."""
    if old == _DEV_NULL:
        return old, new.removeprefix("b/")
    if new == _DEV_NULL:
        return old.removeprefix("a/"), new
    old_first, _, old_rest = old.partition("/")
    new_first, _, new_rest = new.partition("/")
    if (old_first, new_first) == ("a", "b") or (old_first != new_first and old_rest == new_rest):
        return old_rest or old, new_rest or new
    return old, new


def _unread(hunks: Sequence[Hunk]) -> Unread | None:
    lines = [line for hunk in hunks for line in hunk.lines]
    if lines and all(_COMMIT_OF_SUBMODULE.fullmatch(line.text) for line in lines):
        return "SUBMODULE"
    if any(line.text.startswith(_LFS_POINTER) or _ANNEX_POINTER.match(line.text) for line in lines):
        return "POINTER"
    return None


def _unquote(quoted: str) -> str:
    """Undo git's C-style quoting (git-config(1), core.quotePath)."""
    data = _ESCAPE.sub(_unescape, quoted.encode("utf-8", "surrogateescape"))
    return data.decode("utf-8", "surrogateescape")


def _unescape(match: re.Match[bytes]) -> bytes:
    code = match[1]
    return bytes([int(code, 8) & 0xFF if len(code) == 3 else _ESCAPES[code[0]]])


def _malformed(number: int, what: str) -> DiffError:
    return DiffError(
        "DIFF_MALFORMED",
        f"Line {number} of the diff: {what}; send the complete, unedited output of 'git diff'.",
    )
