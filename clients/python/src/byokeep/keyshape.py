"""What a pasted text must not look like to be taken for a provider's API key.

The one rule of the command, the sealing helper and keyvault's intake. Nothing is stripped or
repaired in silence: what is wrong is named, without the text itself, and refused before it is
sealed or sent, for a provider that is asked about a stranger's key has been told it.

It is no list of good prefixes: an unknown shape passes, and its provider decides.
docs/vectors/key-shapes-v1.json holds the cases for other languages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from byokeep import Error

KEY_MIN, KEY_MAX = 16, 512

# Who issues what begins so, by id: name, and prefixes as in the issuers' documentation and in
# gitleaks' rules. The first that fits decides.
_ISSUERS: Final[Mapping[str, tuple[str, str]]] = {
    "anthropic": ("Anthropic", r"sk-ant-"),
    "openrouter": ("OpenRouter", r"sk-or-"),
    "langfuse": ("Langfuse", r"[ps]k-lf-"),
    "openai": ("OpenAI", r"sk-"),
    "gemini": ("Google", r"AIza|AQ\."),
    "github": ("GitHub", r"gh[oprsu]_|github_pat_"),
    "gitlab": ("GitLab", r"gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat|ffct)-"),
    "slack": ("Slack", r"xox[a-z]-|xoxe\.|xapp-"),
    "aws": ("AWS", r"A[KS]IA[A-Z0-9]{16}$|ABSK"),
    "huggingface": ("Hugging Face", r"hf_|api_org_"),
    "groq": ("Groq", r"gsk_"),
    "xai": ("xAI", r"xai-"),
    "perplexity": ("Perplexity", r"pplx-"),
    "replicate": ("Replicate", r"r8_"),
    "nvidia": ("NVIDIA", r"nvapi-"),
    "cerebras": ("Cerebras", r"csk-"),
    "together": ("Together", r"tgp_v1_"),
    "langsmith": ("LangSmith", r"lsv2_"),
    "tavily": ("Tavily", r"tvly-"),
    "databricks": ("Databricks", r"dapi[0-9a-f]{32}"),
    "stripe": ("Stripe", r"[prs]k_(?:live|test)_|whsec_"),
    "npm": ("npm", r"npm_"),
    "pypi": ("PyPI", r"pypi-AgE"),
    "sendgrid": ("SendGrid", r"SG\."),
    "vault": ("Vault", r"hv[brs]\."),
    "digitalocean": ("DigitalOcean", r"do[opr]_v1_"),
    "atlassian": ("Atlassian", r"ATATT3"),
    "notion": ("Notion", r"ntn_"),
    "linear": ("Linear", r"lin_api_"),
    "postman": ("Postman", r"PMAK-"),
    "byokeep": ("byokeep, an id", r"(?:key|lea|rev|att|ink)_[0-9a-z]{26}$"),
}
#: How a key of a known issuer begins, as a regular expression.
KNOWN_PREFIX: Final = "|".join(prefix for _, prefix in _ISSUERS.values())


@dataclass(frozen=True, slots=True)
class Rule:
    """What a text is refused for: the pattern that it has, an ErrorReason, and the sentence."""

    pattern: str
    reason: str
    sentence: str


# In the order in which they are asked: what explains more comes first.
_FORMS: Final[Mapping[str, Rule]] = {
    "pem": Rule(
        r"-----BEGIN ",
        "KEY_FORMAT",
        "this is a PEM block, a certificate or a private key, and no provider's API key",
    ),
    "variable": Rule(
        r"^\s*(?:\$[({A-Za-z_]|%\w+%\s*$|\{\{|[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*_(?:KEY|TOKEN|SECRET)\s*$)",
        "KEY_FORMAT",
        "this is the name of a variable, not its value",
    ),
    "json": Rule(r"^\s*[{\[]", "KEY_FORMAT", "this is JSON; give the key alone"),
    "url": Rule(
        r"(?i)^\W*[a-z][a-z0-9+.-]*://|^\W*www\.|[?&]key=",
        "KEY_FORMAT",
        "this is a URL; give the key alone",
    ),
    "header": Rule(
        r"(?i)^\W*(?:(?:proxy-)?authorization|x-[a-z-]+|api-key)\s*:|^\W*(?:bearer|basic|token)\s",
        "KEY_FORMAT",
        "this is an HTTP header, or the value of one; give the key alone,"
        " without a name and without Bearer",
    ),
    "assignment": Rule(
        r"(?i)^\W*(?:export|set|setx|const|let|var)\s|^\W*[a-z_][\w.-]*['\"]?\s*=\s*[^=\s]"
        r"|^\W*[\w.-]*(?:key|token|secret)['\"]?\s*:\s*\S",
        "KEY_FORMAT",
        "this is NAME=value; give the value alone",
    ),
    "quotes": Rule(
        "[\"'`\u00b4\u2018-\u201f\u00ab\u00bb\u2039\u203a]",
        "KEY_FORMAT",
        "the key is in quotation marks, or has one; give it without them",
    ),
    "masked": Rule(
        r"\.\.\.|\*\*\*|[\u2026\u2022\u25cf\u00b7]",
        "KEY_FORMAT",
        "this is a key's shortened form, as a provider's page shows it; most of it is missing",
    ),
    "whitespace": Rule(
        r"\s", "KEY_CHARSET", "the key has a blank or a line break, in it or around it"
    ),
    "charset": Rule(
        r"[^\x21-\x7e]",
        "KEY_CHARSET",
        "the key has a character that is not printable ASCII:"
        " an accented letter, a typographic dash, or an invisible one such as a byte-order mark",
    ),
    "around": Rule(
        rf"[,;]$|[^A-Za-z0-9._~+=-](?:{KNOWN_PREFIX})",
        "KEY_FORMAT",
        "there is something before or after the key that is not part of it; give the key alone",
    ),
    "length": Rule(
        rf"^(?!.{{{KEY_MIN},{KEY_MAX}}}$)",
        "KEY_LENGTH",
        f"a provider's key has {KEY_MIN} to {KEY_MAX} characters",
    ),
    "admin": Rule(
        r"^sk-(?:admin-|ant-admin)",
        "KEY_IS_ADMIN",
        "this is an administrator's key, which can make and delete keys;"
        " create an ordinary API key for reviews",
    ),
    "login": Rule(
        r"^(?:sk-ant-(?:oat|ort|sid)|sess-|ya29\.|eyJ[\w-]+\.)",
        "KEY_FORMAT",
        "this is the token of somebody's login, not an API key",
    ),
}


class KeyFormatError(Error, ValueError):
    """The text can't be a key of that provider. `rule` is in the published cases, `reason` is a
    name of ErrorReason; the sentence holds nothing of the text."""

    def __init__(self, rule: str, provider: str) -> None:
        """Word a rule: the name of a form, or `issuer:` and the id of an issuer."""
        self.rule = rule
        issuer = rule.removeprefix("issuer:")
        if issuer == rule:
            self.reason, sentence = _FORMS[rule].reason, _FORMS[rule].sentence
        else:
            self.reason = "KEY_OF_OTHER_PROVIDER"
            theirs, ours = (_ISSUERS.get(who, (who,))[0] for who in (issuer, provider))
            sentence = f"this looks like a key of {theirs}, not of {ours}: {ours} is not shown it"
        super().__init__(sentence)


def check_key(provider: str, key: str) -> None:
    """Refuse what can't be a key of `openai`, `anthropic` or `gemini`, or must not be kept.

    Raises:
        KeyFormatError: it names what is wrong, and echoes nothing.
    """
    # The beginning of what is too long says what it is.
    head = key[: 2 * KEY_MAX]
    for name, form in _FORMS.items():
        if re.search(form.pattern, head):
            raise KeyFormatError(name, provider)
    issuer = next((who for who, (_, prefix) in _ISSUERS.items() if re.match(prefix, key)), provider)
    if issuer != provider:
        raise KeyFormatError(f"issuer:{issuer}", provider)
