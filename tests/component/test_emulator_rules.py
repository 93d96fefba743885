"""The emulator's review rules: what each finds, what it lets pass, and that none crashes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.local.emulator import rules
from deploy.local.emulator.rulebook import RULES
from services.common.chunks import plan
from services.common.diff import parse
from services.llm_runner.prompt import ReviewInput, build
from services.llm_runner.providers.findings import parse_findings


def prompt(path, *lines, sign="+", start=7):
    numbered = (f"{start + i:>6} {sign}{line}" for i, line in enumerate(lines))
    return "\n".join(["Review.", "<diff>", f"### {path}", *numbered, "</diff>", "Thanks."])


def names(findings):
    return [f["message"].rpartition("[emulator rule ")[2].rstrip("]") for f in findings]


FOUND = [
    ("hardcoded-credential", "a.go", 'password := "hunter2hunter2"'),
    ("hardcoded-credential", "a.yaml", 'api_key: "0a1b2c3d4e5f"'),
    ("hardcoded-credential", "a.py", 'client(AUTH_TOKEN="abcdef123456")'),
    ("hardcoded-credential", "a.txt", "AKIAABCDEFGHIJKLMNOP"),
    ("sql-concatenation", "a.py", 'db.execute(f"SELECT a FROM t WHERE id = {x}")'),
    ("sql-concatenation", "a.js", "db.query(`DELETE FROM t WHERE id = ${id}`)"),
    ("sql-concatenation", "a.go", 'q := fmt.Sprintf("UPDATE t SET a = %s", a)'),
    ("sql-concatenation", "a.java", '"SELECT a FROM t WHERE n = \'" + name + "\'"'),
    ("eval-exec", "a.py", "value = eval(text)"),
    ("eval-exec", "a.js", "const f = new Function(body)"),
    ("shell-injection", "a.py", "subprocess.run(cmd, shell=True)"),
    ("shell-interpolation", "a.py", 'os.system(f"rm -r {path}")'),
    ("shell-interpolation", "a.js", "execSync(`git clone ${url}`)"),
    ("yaml-load", "a.py", "yaml.load(stream)"),
    ("bare-except", "a.py", "    except:"),
    ("empty-catch", "a.ts", "try { f() } catch (e) {}"),
    ("empty-catch", "a.py", "    except ValueError: pass"),
    ("tls-not-verified", "a.py", "httpx.get(url, verify=False, timeout=1)"),
    ("tls-not-verified", "a.go", "tls.Config{InsecureSkipVerify: true}"),
    ("weak-password-hash", "a.py", "hashlib.md5(password.encode()).hexdigest()"),
    ("weak-password-hash", "a.js", "createHash('sha1').update(passwd)"),
    ("mutable-default", "a.py", "def add(item, items=[]):"),
    ("none-comparison", "a.py", "if x == None:"),
    ("unsafe-unpickling", "a.py", "data = pickle.loads(blob)"),
    ("inner-html", "a.ts", "node.innerHTML = message"),
    ("request-without-timeout", "a.py", "requests.get(url)"),
    ("secret-in-output", "a.py", 'print(f"using {api_key}")'),
    ("secret-in-output", "a.js", "console.log(user.password)"),
    ("todo-left", "a.rs", "// TODO: handle the error"),
]

PASSED = [
    ("a.py", 'password = os.environ["PASSWORD"]'),
    ("a.py", 'password = "${DB_PASSWORD}"'),
    ("a.py", 'db.execute("SELECT a FROM t WHERE id = %s", (x,))'),
    ("a.py", "ast.literal_eval(text)"),
    ("a.js", "const m = pattern.exec(text)"),
    ("a.py", "# eval(text) would be wrong here"),
    ("a.py", 'print("never call eval(x)")'),
    ("a.py", 'os.system("ls")'),
    ("a.py", "yaml.load(stream, Loader=yaml.SafeLoader)"),
    ("a.py", "hashlib.md5(block).hexdigest()"),
    ("a.py", "def add(item, items=None):"),
    ("a.py", "if x is None:"),
    ("a.js", 'node.innerHTML = "";'),
    ("a.py", "requests.get(url, timeout=3)"),
    ("a.py", 'logger.info("token refreshed")'),
    ("a.py", "logger.info(mask(token))"),
    ("a.md", "the todo list of the eval team"),
]


@pytest.mark.parametrize(("rule", "path", "line"), FOUND)
def test_finds(rule, path, line):
    findings = rules.review(prompt(path, "x", line))
    assert names(findings) == [rule]
    assert (findings[0]["path"], findings[0]["start_line"], findings[0]["end_line"]) == (path, 8, 8)


def test_every_rule_has_an_example():
    shown = {rule for rule, _, _ in FOUND} | {"swallowed-exception"}
    assert shown == {rule.name for rule in RULES}


@pytest.mark.parametrize(("path", "line"), PASSED)
def test_lets_pass(path, line):
    assert rules.review(prompt(path, line)) == []


@pytest.mark.parametrize("sign", [" ", "-"])
def test_only_added_lines(sign):
    assert rules.review(prompt("a.py", "eval(x)", sign=sign)) == []
    assert rules.review("<diff>\n### a.py\n       -eval(x)\n</diff>") == []


def test_looks_at_the_line_after():
    (finding,) = rules.review(prompt("a.py", "except OSError:", "    pass  # why"))
    assert names([finding]) == ["swallowed-exception"]
    assert rules.review(prompt("a.py", "except OSError:", "    raise")) == []


def test_a_call_over_several_lines():
    assert rules.review(prompt("a.py", "requests.get(", "    url,", "    timeout=3,", ")")) == []
    (finding,) = rules.review(prompt("a.py", "requests.get(", "    url,", ")"))
    assert (finding["start_line"], finding["end_line"]) == (7, 9)


def test_a_second_file_and_line_numbers_of_any_width():
    text = "<diff>\n### a.py\n     1 +ok\n### b.py\n1234567 +eval(x)\n</diff>"
    (finding,) = rules.review(text)
    assert (finding["path"], finding["start_line"]) == ("b.py", 1234567)


def test_words_about_a_diff_are_no_diff():
    text = "between\n<diff>\nand\n" + prompt("a.py", "eval(x)")
    assert len(rules.review(text)) == 1
    for broken in ("", "<diff>", "</diff>\n<diff>", "<diff>\n     1 +eval(x)\n</diff>"):
        assert rules.review(broken) == []


def test_many_findings_are_bounded():
    assert len(rules.review(prompt("a.py", *["eval(x)"] * 1000))) == rules.MAX_FINDINGS


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "line",
    [
        "select " * 5000,
        "requests.get(" * 5000,
        "password" * 5000,
        "f'{" * 5000,
        "a=[" * 5000,
        "except " * 5000,
        'print("' * 5000,
        "x.innerHTML='" + "$" * 5000,
        "catch (" * 5000,
    ],
)
def test_hostile_lines_take_no_time(line):
    rules.review(prompt("a.py", *[line] * 20))
    rules.review(prompt("a.js", *[line] * 20))


PIECES = st.sampled_from(
    [
        "<diff>",
        "</diff>",
        "### a.py",
        "### ",
        "     1 +eval(x)",
        "     2  pass",
        "       -x",
        "     3 +except X:",
        "999999999999 +eval(x)",
        "     0 +eval(",
        "\r",
        "\x00",
        "     4 +f'{'",
    ]
)


@given(st.lists(PIECES | st.text(max_size=20)))
def test_whatever_comes_in_a_valid_answer_goes_out(pieces):
    findings = rules.review("\n".join(pieces))
    assert parse_findings(json.dumps({"findings": findings})) == findings


def test_reads_what_the_runner_writes():
    """The runner's real prompt, from a real diff, comes back with the right line."""
    text = "--- a/x.py\n+++ b/x.py\n@@ -8,2 +8,3 @@\n a = 1\n+b = eval(text)\n c = 3\n"
    diff = parse(f"diff --git a/x.py b/x.py\n{text}".encode())
    (chunk,) = plan(diff, 10_000, salt="salt")
    _, user = build(ReviewInput("r", "t", "<diff>\nin words", "guidance"), chunk)
    (finding,) = rules.review(user)
    assert (finding["path"], finding["start_line"]) == ("x.py", 9)


def test_reads_a_line_that_is_shown_in_pieces():
    line = "x = '" + "y" * 40_000 + "'; eval(text)"
    diff = parse(f"--- a/x.py\n+++ b/x.py\n@@ -8,0 +8,2 @@\n+pass\n+{line}\n")
    (chunk,) = plan(diff, 30_000, salt="salt")
    _, user = build(ReviewInput("r", "", "", ""), chunk)
    assert {finding["start_line"] for finding in rules.review(user)} == {9}
