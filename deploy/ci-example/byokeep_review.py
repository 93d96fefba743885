"""Reviews the pull request of a GitHub Actions run with `byokeep`, and posts the review.

    python byokeep_review.py --fail-on high --sarif byokeep.sarif

Copy it beside the workflow; it needs Python >= 3.11, git and the command `byokeep`, and nothing
else of a byokeep checkout. It takes from the environment what Actions sets (GITHUB_API_URL,
GITHUB_EVENT_PATH, GITHUB_REPOSITORY), GITHUB_TOKEN with `pull-requests: write`, and
BYOKEEP_CONFIG. It ends as `byokeep review` ends: 0, 1 for a finding as bad as --fail-on, 8 for
code that no model read, another number for a review that could not be had.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_REVIEWED = (0, 1, 8)
_TRIES = 4
_LONGEST_WAIT_SECONDS = 60.0
_TIMEOUT_SECONDS = 30.0
_MAX_BODY = 65_000  # GitHub takes 65,536 characters


def main() -> int:
    """Review, write SARIF, post; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fail-on", choices=["info", "low", "medium", "high", "critical"])
    parser.add_argument("--sarif", type=Path, help="write SARIF here, for code scanning")
    parser.add_argument("--no-post", action="store_true", help="post nothing to the pull request")
    arguments = parser.parse_args()
    event = json.loads(Path(os.environ["GITHUB_EVENT_PATH"]).read_text())
    pull = event.get("pull_request")
    if pull is None:
        sys.exit("byokeep: this event has no pull request; run on pull_request")
    code, review = _review(pull, arguments.fail_on)
    identifier = str(review.get("name", "")).rpartition("/")[2]
    if not identifier:
        return code or 7
    if arguments.sarif:
        arguments.sarif.write_text(_export(identifier, "sarif"))
    if code in _REVIEWED and not arguments.no_post:
        _post(pull, json.loads(_export(identifier, "github")))
    return code


def _review(pull: dict[str, Any], fail_on: str | None) -> tuple[int, dict[str, Any]]:
    command = ["review", "--json", f"--base=origin/{pull['base']['ref']}"]
    command += [f"--pr={pull['number']}", f"--head={pull['head']['sha']}"]
    command += [f"--repo={os.environ['GITHUB_REPOSITORY']}", f"--title={pull['title']}"]
    command += [f"--fail-on={fail_on}"] if fail_on else []
    done = _byokeep(*command)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}


def _export(identifier: str, form: str) -> str:
    return _byokeep("review", "show", identifier, "--format", form).stdout


def _byokeep(*arguments: str) -> subprocess.CompletedProcess[str]:
    # It has no use for the token of GitHub.
    environment = {name: value for name, value in os.environ.items() if name != "GITHUB_TOKEN"}
    return subprocess.run(
        ["byokeep", *arguments],  # noqa: S607 - the one on PATH
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )


def _post(pull: dict[str, Any], review: dict[str, Any]) -> None:
    reviews = f"repos/{os.environ['GITHUB_REPOSITORY']}/pulls/{pull['number']}/reviews"
    marker = f"<!-- byokeep {pull['head']['sha']} -->"
    for page in range(1, 11):
        found = _github("GET", f"{reviews}?per_page=100&page={page}")
        if any(_is_ours(each, marker) for each in found):
            print("byokeep: this commit has its review already")
            return
        if len(found) < 100:
            break
    words = str(review["body"])
    try:
        _github("POST", reviews, review | {"body": f"{words[:_MAX_BODY]}\n\n{marker}"})
    except urllib.error.HTTPError as error:
        if error.code != 422 or not review["comments"]:
            raise
        # GitHub refuses all comments for one on a line that it does not show in the diff.
        told = "\n\n".join(
            f"`{each['path']}:{each['line']}` {each['body']}" for each in review["comments"]
        )
        body = f"{words}\n\n{told}"[:_MAX_BODY]
        _github("POST", reviews, review | {"comments": [], "body": f"{body}\n\n{marker}"})


def _is_ours(review: dict[str, Any], marker: str) -> bool:
    return review["user"]["type"] == "Bot" and marker in (review.get("body") or "")


def _github(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(  # noqa: S310 - Actions sets it
        f"{os.environ.get('GITHUB_API_URL', 'https://api.github.com')}/{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}",
            "Content-Type": "application/json",
            "X-GitHub-Api-Version": "2022-11-28",
        },
    )
    for left in reversed(range(_TRIES)):
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            wait = error.headers.get("Retry-After", "")
            limited = error.code in (403, 429) and wait.isdecimal()
            # A POST that failed within GitHub may have been done: `marker` finds it next time.
            if not left or not (limited or (error.code >= 500 and method == "GET")):
                print(f"byokeep: GitHub answers {error.code}", file=sys.stderr)
                raise
        time.sleep(min(float(wait) if limited else 1.0, _LONGEST_WAIT_SECONDS))
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main())
