"""The review rules themselves: patterns, and what is said when one matches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_PYTHON: Final = frozenset({".py", ".pyi"})
_SCRIPT: Final = frozenset({".js", ".jsx", ".mjs", ".cjs", ".ts", ".tsx", ".vue"})
_DYNAMIC: Final = _PYTHON | _SCRIPT | {".rb", ".php"}

_SENSITIVE: Final = r"(?:passw(?:or)?d|passphrase|secret|token|api_?key|private_?key|credential)"
# A value put into a text: f-string, template literal, concatenation, format.
_INTERPOLATION: Final = re.compile(
    r"""\b[fF]["'][^"']*\{|\$\{|["'`]\s*\+\s*\w|\w\s*\+\s*["'`]|["']\s*%\s*[\w(]"""
    r"""|["']\s*\.\s*format\s*\(|Sprintf\s*\(|["']\s*\.\s*\$"""
)


@dataclass(frozen=True, slots=True)
class Rule:
    """``pattern`` and ``also`` must match, ``unless`` must not; ``then``: the next line.

    Only lines with one of ``needles`` (lower case) are looked at: most hold none, and
    searching a substring costs a hundredth of a pattern.
    ``suffixes`` None means every file. ``whole_statement`` looks on to the closing
    bracket, ``outside_strings`` ignores literals, ``comments`` looks into comments too.
    """

    name: str
    severity: str
    category: str
    title: str
    message: str
    suggestion: str
    needles: tuple[str, ...]
    pattern: re.Pattern[str]
    suffixes: frozenset[str] | None = None
    also: re.Pattern[str] | None = None
    unless: re.Pattern[str] | None = None
    then: re.Pattern[str] | None = None
    whole_statement: bool = False
    outside_strings: bool = False
    comments: bool = False


RULES: Final[tuple[Rule, ...]] = (
    Rule(
        "hardcoded-credential",
        "critical",
        "security",
        "Hard-coded credential",
        "A credential stands in the source: everybody who can read the repository, or any "
        "copy of its history, has it.",
        "Read it from the environment or a secret manager, and replace the leaked one.",
        (
            "passw",
            "pwd",
            "secret",
            "key",
            "token",
            "akia",
            "ghp_",
        ),
        re.compile(
            r"(?i:passw(?:or)?d|passwd|pwd|secret|api[_-]?key|auth[_-]?token|access[_-]?token"
            r"|private[_-]?key)[\w-]{0,40}[\"']?\s*(?::=|=>|[:=])\s*[\"'`][^\"'`\s]{6,}[\"'`]"
            r"|\bAKIA[0-9A-Z]{16}\b|\bghp_[A-Za-z0-9]{36}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
        ),
        unless=re.compile(
            r"(?i)environ|getenv|process\.env|\$\{|\{\{|<[^>]+>|x{4}|\*{4}|example|changeme|your[_-]"
        ),
        comments=True,
    ),
    Rule(
        "sql-concatenation",
        "critical",
        "security",
        "SQL built from strings",
        "A value is put into the text of an SQL statement: whoever controls it can change "
        "the statement.",
        "Pass the value as a parameter of the statement.",
        (
            "select",
            "insert",
            "update",
            "delete",
        ),
        re.compile(
            r"(?i)[\"'`]\s*(?:select\b.+\bfrom\b|insert\s+into\b|update\b.+\bset\b|delete\s+from\b)"
        ),
        also=_INTERPOLATION,
        whole_statement=True,
    ),
    Rule(
        "eval-exec",
        "high",
        "security",
        "Code from data",
        "Text is run as code: if any part of it comes from outside, so does the code.",
        "Parse the data for what it is, or choose from a fixed table of functions.",
        (
            "eval",
            "exec",
            "function",
        ),
        re.compile(r"(?<![\w.])(?:eval|exec)\s*\(|\bnew\s+Function\s*\("),
        suffixes=_DYNAMIC,
        outside_strings=True,
        unless=re.compile(r"\bdef\s+(?:eval|exec)\b|\bfunction\s+(?:eval|exec)\b"),
    ),
    Rule(
        "shell-injection",
        "high",
        "security",
        "Command through a shell",
        "The command goes through a shell, which gives meaning to characters in its arguments.",
        "Pass the program and its arguments as a list, without a shell.",
        ("shell",),
        re.compile(r"\bshell\s*=\s*True\b"),
        suffixes=_PYTHON,
        whole_statement=True,
        outside_strings=True,
    ),
    Rule(
        "shell-interpolation",
        "critical",
        "security",
        "Value in a shell command",
        "A value is put into a command that a shell reads: whoever controls it can run commands.",
        "Pass the program and its arguments as a list, without a shell.",
        (
            "system",
            "popen",
            "exec",
        ),
        re.compile(
            r"\bos\s*\.\s*(?:system|popen)\s*\(|(?<![\w.])exec(?:Sync)?\s*\(\s*[`\"']"
            r"|\bchild_process\.exec|exec\.Command\(\s*\"(?:ba)?sh\"\s*,\s*\"-c\""
        ),
        also=_INTERPOLATION,
        whole_statement=True,
    ),
    Rule(
        "yaml-load",
        "high",
        "security",
        "yaml.load without a safe loader",
        "yaml.load can build any Python object that the document names.",
        "Use yaml.safe_load.",
        ("yaml",),
        re.compile(r"\byaml\s*\.\s*(?:unsafe_|full_)?load\s*\("),
        suffixes=_PYTHON,
        unless=re.compile(r"\bC?SafeLoader\b"),
        whole_statement=True,
        outside_strings=True,
    ),
    Rule(
        "bare-except",
        "medium",
        "correctness",
        "Bare except",
        "A bare except also catches KeyboardInterrupt, SystemExit and every programming error.",
        "Name the exceptions that are expected here.",
        ("except",),
        re.compile(r"^\s*except\s*:"),
        suffixes=_PYTHON,
    ),
    Rule(
        "swallowed-exception",
        "medium",
        "correctness",
        "Exception swallowed",
        "The exception is dropped: the failure stays invisible and the program goes on wrongly.",
        "Handle it, log it, or let it rise.",
        ("except",),
        re.compile(r"^\s*except\b[^:]+:\s*$"),
        suffixes=_PYTHON,
        then=re.compile(r"^\s*(?:pass|\.\.\.)\s*(?:#.*)?$"),
    ),
    Rule(
        "empty-catch",
        "medium",
        "correctness",
        "Exception swallowed",
        "The exception is dropped: the failure stays invisible and the program goes on wrongly.",
        "Handle it, log it, or let it rise.",
        (
            "except",
            "catch",
        ),
        re.compile(r"^\s*except\b[^:]+:\s*pass\b|\bcatch\s*(?:\([^)]*\))?\s*\{\s*\}"),
    ),
    Rule(
        "tls-not-verified",
        "high",
        "security",
        "TLS certificate not verified",
        "Without the check anybody on the way can read and change the traffic.",
        "Keep verification on; trust a private CA by its certificate.",
        (
            "verif",
            "reject",
        ),
        re.compile(
            r"\bverify\s*=\s*False\b|\bInsecureSkipVerify\s*:\s*true\b"
            r"|\brejectUnauthorized\s*:\s*false\b|\bNODE_TLS_REJECT_UNAUTHORIZED\b"
            r"|_create_unverified_context\b|CURLOPT_SSL_VERIFYPEER\s*,\s*(?:false|0)"
        ),
    ),
    Rule(
        "weak-password-hash",
        "high",
        "security",
        "Weak hash for a password",
        "MD5 and SHA-1 are so fast that a stolen list of passwords is guessed in hours.",
        "Use argon2id, scrypt or bcrypt with a salt for each password.",
        (
            "md5",
            "sha1",
            "sha-1",
        ),
        re.compile(
            r"(?i)\bhashlib\.(?:md5|sha1)\b|createHash\(\s*[\"'](?:md5|sha1)"
            r"|\b(?:md5|sha1)\.(?:Sum|New)\b|getInstance\(\s*\"(?:MD5|SHA-?1)\"|\b(?:md5|sha1)\s*\("
        ),
        also=re.compile(r"(?i)passw(?:or)?d|passwd|pwd|passphrase"),
        whole_statement=True,
    ),
    Rule(
        "mutable-default",
        "medium",
        "correctness",
        "Mutable default argument",
        "The default is made once and shared by all calls: what one adds, the next one sees.",
        "Default to None and make the object inside the function.",
        ("def ",),
        re.compile(r"\bdef\s+\w+\s*\(.*=\s*(?:\[\s*\]|\{\s*\}|(?:list|dict|set)\(\s*\))"),
        suffixes=_PYTHON,
    ),
    Rule(
        "none-comparison",
        "low",
        "style",
        "Comparison with None by ==",
        "An object can define == as it likes; identity is what is meant.",
        "Write 'is None' or 'is not None'.",
        ("none",),
        re.compile(r"[=!]=\s*None\b|\bNone\s*[=!]="),
        suffixes=_PYTHON,
        outside_strings=True,
    ),
    Rule(
        "unsafe-unpickling",
        "high",
        "security",
        "Unpickling",
        "Loading a pickle runs whatever code the pickle says.",
        "Use a data format such as JSON, or verify a signature first.",
        (
            "pickle",
            "dill",
            "joblib",
        ),
        re.compile(r"\b(?:c?[pP]ickle|dill|joblib)\s*\.\s*loads?\s*\("),
        suffixes=_PYTHON,
        outside_strings=True,
    ),
    Rule(
        "inner-html",
        "high",
        "security",
        "HTML from data",
        "Markup is set from a value: if a user controls it, it is their script on your page.",
        "Set textContent, or sanitise the markup first.",
        ("html",),
        re.compile(r"\.(?:inner|outer)HTML\s*\+?=(?!=)|\bdangerouslySetInnerHTML\b"),
        suffixes=_SCRIPT | {".html"},
        unless=re.compile(r"HTML\s*\+?=\s*([\"'`])(?:(?!\1|\$\{).)*\1\s*;?\s*$"),
    ),
    Rule(
        "request-without-timeout",
        "medium",
        "performance",
        "HTTP call without a timeout",
        "requests waits for ever by default: a peer that hangs takes this thread with it.",
        "Pass timeout=(connect, read) in seconds.",
        ("requests",),
        re.compile(r"\brequests\s*\.\s*(?:get|post|put|patch|delete|head|options|request)\s*\("),
        suffixes=_PYTHON,
        unless=re.compile(r"\btimeout\s*=|\*\*"),
        whole_statement=True,
        outside_strings=True,
    ),
    Rule(
        "secret-in-output",
        "high",
        "security",
        "Secret written to a log",
        "A secret goes to an output that is kept and read by people who should not have it.",
        "Log that the value is set, never the value.",
        (
            "print",
            "console",
            "log",
            "var_dump",
            "puts",
        ),
        re.compile(
            r"(?i)(?:\bprint(?:ln|f)?|\bconsole\.\w+|\blog(?:ger|ging)?\.\w+|\bfmt\.F?print\w*"
            r"|\bSystem\.out\.print\w*|\bvar_dump|\bputs)\s*\(?.*" + _SENSITIVE
        ),
        outside_strings=True,
        whole_statement=True,
        unless=re.compile(r"(?i)redact|mask|len\(|is (?:not )?None|\bbool\("),
    ),
    Rule(
        "todo-left",
        "info",
        "maintainability",
        "Unfinished work left",
        "A note says that something is still to be done here.",
        "Do it now, or open an issue and name it in the comment.",
        (
            "todo",
            "fixme",
        ),
        re.compile(r"\b(?:TODO|FIXME)\b"),
        comments=True,
    ),
)
