"""`services.common.diff`: what git prints, what hands make, and what must be refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.common import diff as diffs
from services.common.diff import DiffError, FileDiff, parse

HEAD = "diff --git a/x b/x\n--- a/x\n+++ b/x\n"


class Repo:
    """A throw-away repository; `diff` compares the work tree with the first commit."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "-q")

    def git(self, *args: str) -> bytes:
        identity = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false")
        quiet = ("-c", "core.autocrlf=false", "-c", "core.safecrlf=false")
        return subprocess.run(
            ["git", *identity, *quiet, *args],
            cwd=self.root,
            check=True,
            capture_output=True,
            timeout=30,
        ).stdout

    def write(self, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(content)

    def commit(self, files: dict[str, bytes]) -> None:
        self.write(files)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "message\n\n--- a/fake\n+++ b/fake\nrename from p\n")

    def diff(self, *args: str) -> bytes:
        self.git("add", "-A")
        return self.git("diff", "--cached", *args)


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo(tmp_path)


@pytest.mark.parametrize("line", ["", "+", " x"])
def test_many_lines_are_refused_before_they_are_parsed(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte of empty lines took 200 MB. Was shown to fail without the check in _decode."""
    monkeypatch.setattr(diffs, "_Parser", None)
    count = diffs.MAX_LINES
    with pytest.raises(DiffError) as refused:
        parse(f"{HEAD}@@ -0,0 +1,{count} @@\n" + f"{line}\n" * count)
    assert refused.value.reason == "DIFF_TOO_LARGE"
    assert refused.value.figures == {"lines": count + 4, "max_lines": count}


def test_many_lines_are_taken() -> None:
    count = diffs.MAX_LINES - 4
    (hunk,) = only(f"{HEAD}@@ -0,0 +1,{count} @@\n" + "+x\n" * count).hunks
    assert len(hunk.lines) == count


def only(diff: str | bytes) -> FileDiff:
    (file,) = parse(diff).files
    return file


def shown(file: FileDiff) -> list[tuple[str, int | None, int | None, str]]:
    return [(x.kind, x.old_no, x.new_no, x.text) for h in file.hunks for x in h.lines]


def reason(diff: str | bytes) -> str:
    with pytest.raises(DiffError) as caught:
        parse(diff)
    return caught.value.reason


# --- by git -----------------------------------------------------------------------------------


def test_git_numbers_and_section(repo: Repo) -> None:
    before = b"def f():\n" + b"".join(b"    line%d\n" % n for n in range(1, 30))
    repo.commit({"m.py": before})
    repo.write(
        {"m.py": before.replace(b"line5\n", b"five\n    six\n").replace(b"    line20\n", b"")}
    )
    file = only(repo.diff("-U1"))
    assert file.status == "modified"
    assert shown(file)[:4] == [
        (" ", 5, 5, "    line4"),
        ("-", 6, None, "    line5"),
        ("+", None, 6, "    five"),
        ("+", None, 7, "    six"),
    ]
    assert file.hunks[1].section == "def f():"
    assert parse(repo.diff("-U1")).reviewable_lines("m.py") == {5, 6, 7, 8, 21, 22}
    assert parse(repo.diff("-U1")).reviewable_lines("other") == frozenset()


@pytest.mark.parametrize("quote", ["true", "false"])
@pytest.mark.parametrize(
    "name", ["é.txt", "a b c.txt", 'q"uo\\te.txt', " lead", "b/ b/x", "日本/☃ x", "a/x", "--- y"]
)
def test_git_paths(repo: Repo, name: str, quote: str) -> None:
    repo.commit({name: b"1\n", "mode-" + name: b"same\n", "old-" + name: b"moved\n" * 9})
    repo.write({name: b"2\n", "new-" + name: b"moved\n" * 9, "empty-" + name: b""})
    (repo.root / ("mode-" + name)).chmod(0o755)
    (repo.root / ("old-" + name)).unlink()
    diff = parse(repo.git("add", "-A") + repo.git("-c", f"core.quotePath={quote}", "diff", "HEAD"))
    assert {(f.old_path, f.new_path, f.status) for f in diff.files} == {
        (name, name, "modified"),
        ("mode-" + name, "mode-" + name, "mode"),
        ("old-" + name, "new-" + name, "renamed"),
        (None, "empty-" + name, "added"),
    }


@pytest.mark.parametrize(
    "args",
    [
        ["--no-prefix"],
        ["--src-prefix=i/", "--dst-prefix=w/"],
        ["--src-prefix=long/", "--dst-prefix=x/"],
        ["-R"],
    ],
)
def test_git_prefixes(repo: Repo, args: list[str]) -> None:
    repo.commit({"a/x": b"1\n"})
    repo.write({"a/x": b"2\n"})
    assert (only(repo.diff(*args)).old_path, only(repo.diff(*args)).new_path) == ("a/x", "a/x")


@pytest.mark.parametrize("args", [[], ["--no-prefix"]])
def test_git_added_deleted_mode_copy_binary(repo: Repo, args: list[str]) -> None:
    repo.commit({"gone": b"x\n", "run.sh": b"a\n", "bin": b"\0\1", "src": b"same\n" * 20})
    (repo.root / "gone").unlink()
    (repo.root / "run.sh").chmod(0o755)
    repo.write({"new": b"x", "run.sh": b"b\n", "bin": b"\0\2", "copy": b"same\n" * 20})
    for extra in ([], ["--binary"]):
        files = {f.path: f for f in parse(repo.diff("-C", "-C", *args, *extra)).files}
        assert (files["gone"].status, files["gone"].new_path) == ("deleted", None)
        assert (files["new"].status, files["new"].old_path) == ("added", None)
        assert files["new"].hunks[0].lines[0].no_newline
        assert (files["copy"].status, files["copy"].old_path) == ("copied", "src")
        assert files["bin"].unread == "BINARY"
        assert files["bin"].hunks == ()
        run = files["run.sh"]
        assert (run.status, run.old_mode, run.new_mode) == ("modified", "100644", "100755")


def test_git_content_is_split_on_newlines_only(repo: Repo) -> None:
    odd = ["crlf\r", "form\ffeed", "para\u2029sep\u2028", "nel\x85", "bare\rcr", "", "\r", "\x1c"]
    repo.commit({"x": b"start\n"})
    repo.write({"x": ("start\n" + "".join(line + "\n" for line in odd)).encode()})
    assert [text for kind, _, _, text in shown(only(repo.diff())) if kind == "+"] == odd


def test_git_lines_that_look_like_headers(repo: Repo) -> None:
    repo.commit({"x": b"-- a/y\n@@ -1 +1 @@\n\\ No newline\nk\n"})
    repo.write({"x": b"++ b/y\ndiff --git a/z b/z\n\\ No newline\nk"})
    assert shown(only(repo.diff())) == [
        ("-", 1, None, "-- a/y"),
        ("-", 2, None, "@@ -1 +1 @@"),
        ("+", None, 1, "++ b/y"),
        ("+", None, 2, "diff --git a/z b/z"),
        (" ", 3, 3, "\\ No newline"),
        ("-", 4, None, "k"),
        ("+", None, 4, "k"),
    ]
    assert [x.no_newline for x in only(repo.diff()).hunks[0].lines] == [False] * 6 + [True]


@pytest.mark.parametrize("command", [["show"], ["format-patch", "--stdout", "-1"], ["log", "-p"]])
def test_git_mail_and_log_text_is_noise(repo: Repo, command: list[str]) -> None:
    repo.commit({"x": b"1\n"})
    repo.commit({"x": b"2\n", "y": b"1\n"})
    diff = parse(repo.git(*command))
    assert {f.path for f in diff.files} == {"x", "y"}
    assert [f.status for f in diff.files][:2] == ["modified", "added"]


def test_git_long_line(repo: Repo) -> None:
    repo.commit({"x": b"1\n"})
    repo.write({"x": b"a" * 200_000 + b"\n"})
    assert len(only(repo.diff()).hunks[0].lines[1].text) == 200_000


def test_git_merge_is_refused_by_name(repo: Repo) -> None:
    assert reason("diff --cc x\nindex 1,2..3\n--- a/x\n+++ b/x\n@@@ -1,1 -1,1 +1,2 @@@\n") == (
        "DIFF_MALFORMED"
    )


# --- by hand ----------------------------------------------------------------------------------


def test_plain_diff_without_git_header() -> None:
    plain = (
        "Only in old: z\ndiff -ru old/d/x.c new/d/x.c\n"
        "--- old/d/x.c\t2026-01-01 00:00:00.0 +0000\n+++ new/d/x.c\t2026-01-02 00:00:00.0 +0000\n"
        "@@ -1 +1 @@\n-a\n+b\n"
        "--- x.orig\n+++ x\n@@ -1 +1 @@\n-a\n+b\n"
        "--- /dev/null\n+++ b/n\n@@ -0,0 +1 @@\n+b\n"
        "--- a/o\n+++ /dev/null\n@@ -1 +0,0 @@\n-b\n"
        "--- a/m\n+++ b/n\n@@ -1 +1 @@\n-a\n+b\n"
        "Binary files a/q.png and b/q.png differ\n"
        "Only in new/d: e.c\nOnly in new: f.c\n"
    )
    assert [(f.old_path, f.new_path, f.status) for f in parse(plain).files] == [
        ("z", "z", "modified"),
        ("d/x.c", "d/x.c", "modified"),
        ("x.orig", "x", "modified"),
        (None, "n", "added"),
        ("o", None, "deleted"),
        ("m", "n", "modified"),
        ("q.png", "q.png", "modified"),
        ("d/e.c", "d/e.c", "modified"),
        ("f.c", "f.c", "modified"),
    ]
    unread = [(file.path, file.unread) for file in parse(plain).files if file.unread]
    assert unread == [
        ("z", "NOT_SHOWN"),
        ("q.png", "BINARY"),
        ("d/e.c", "NOT_SHOWN"),
        ("f.c", "NOT_SHOWN"),
    ]


@pytest.mark.parametrize(
    ("text", "path", "why"),
    [
        ("diff --git a/x b/x\nBinary files a/x and b/x differ\n", "x", "BINARY"),
        ("diff --git a/x b/x\nGIT binary patch\nliteral 1\nIcmZ\n", "x", "BINARY"),
        ("Binary files old/d/x and new/d/x differ\n", "d/x", "BINARY"),
        ("Submodule lib 0123abc..4567def:\n  > a commit\n", "lib", "SUBMODULE"),
        ("Submodule a b 0000000...4567def (new submodule)\n", "a b", "SUBMODULE"),
        (
            HEAD
            + "@@ -1 +1 @@\n-Subproject commit {0}\n+Subproject commit {0}\n".format("ab" * 20),
            "x",
            "SUBMODULE",
        ),
        (
            HEAD + "@@ -1,3 +1,3 @@\n version https://git-lfs.github.com/spec/v1\n"
            "-oid sha256:00\n+oid sha256:11\n size 3\n",
            "x",
            "POINTER",
        ),
        (HEAD + "@@ -0,0 +1 @@\n+/annex/objects/SHA256E-s3--00.bin\n", "x", "POINTER"),
        (
            "diff --git a/x b/x\nnew file mode 120000\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n"
            "+../.git/annex/objects/f8/7K/SHA256E-s3--00/SHA256E-s3--00\n"
            "\\ No newline at end of file\n",
            "x",
            "POINTER",
        ),
        (HEAD + "@@ -1 +1 @@\n-a\n+see /annex/objects/x\n", "x", None),
        (HEAD + "@@ -1 +1 @@\n-a\n+Subproject commit unknown\n", "x", None),
        (HEAD + "@@ -9 +9 @@\n-a\n+version https://git-lfs.github.com/spec/v1\n", "x", None),
        (HEAD + "@@ -9 +9 @@\n-a\n+ oid sha256:11\n", "x", None),
        ("diff --git a/x b/y\nrename from x\nrename to y\n", "y", None),
        ("diff --git a/x b/x\nold mode 100644\nnew mode 100755\n", "x", None),
        ("diff --git a/x b/x\nnew file mode 100644\nindex 0..1\n", "x", None),
    ],
)
def test_what_nobody_can_read_is_named(text: str, path: str, why: str | None) -> None:
    file = only(text)
    assert (file.path, file.unread) == (path, why)


@pytest.mark.parametrize(
    "pointer",
    [
        "version https://hawser.github.com/spec/v1\noid sha256:{0}\nsize 3\n",
        "version http://git-media.io/v/2\noid sha256:{0}\nsize 3\n",
        "version https://git-lfs.github.com/spec/v1\r\noid sha256:{0}\r\nsize 3\r\n",
        "\n\nversion https://git-lfs.github.com/spec/v1\noid sha256:{0}\nsize 3\n",
        "version https://git-lfs.github.com/spec/v1\n\n\n\noid sha256:{0}\n\n\n\n\nsize {1}\n",
        "version https://git-lfs.github.com/spec/v1\next-0-a sha256:c\next-1-b sha256:c\n"
        "ext-2-c sha256:c\next-3-d sha256:c\noid sha256:{0}\nsize 3\n",
    ],
)
def test_every_pointer_that_git_lfs_follows_is_named(repo: Repo, pointer: str) -> None:
    """The change's author chooses its form, and what lies behind it passed the gate unread. Shown
    to fail, all of them, with its usual first line looked for in the first line."""
    repo.commit({"x.py": pointer.format("a" * 64, 3).encode()})
    added = only(repo.git("show", "--format="))
    repo.commit({"x.py": pointer.format("b" * 64, 4).encode()})
    changed = only(repo.git("show", "--format="))
    assert (added.unread, changed.unread) == ("POINTER", "POINTER")


def test_words_of_a_commit_name_no_file(repo: Repo) -> None:
    repo.commit({"x": b"1\n"})
    repo.write({"x": b"2\n"})
    repo.git("commit", "-qam", "Why\n\nOnly in new: y\nBinary files a/z and b/z differ\n")
    patch = repo.git("format-patch", "--stdout", "-1")
    assert [file.path for file in parse(patch + patch).files] == ["x", "x"]


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "//host/x", "../x", "x/../../y", "a/..", "./x", "x/./y", "x//y", "x/"),
        *("C:/x", "c:\\x", "https://evil.example/x", "file:///x", "x/..", ".", ".."),
    ],
)
def test_a_path_that_leads_out_of_the_tree_is_refused(path: str) -> None:
    """Was shown to fail without _OUTSIDE."""
    hunk = "@@ -1 +1 @@\n-a\n+b\n"
    for text in (
        f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n{hunk}",
        f"--- a/{path}\n+++ b/{path}\n{hunk}",
        f"--- {path}\n+++ {path}\n{hunk}",
        f"diff --git a/x b/y\nrename from x\nrename to {path}\n",
        f"diff --git a/x b/y\nrename from {path}\nrename to y\n",
        f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+b\n",
        f"--- a/{path}\n+++ /dev/null\n@@ -1 +0,0 @@\n-b\n",
    ):
        assert reason(text) == "DIFF_MALFORMED"


@pytest.mark.parametrize("path", [".x", "..x/y", "x..", "a/...", "x:y", "http:x", "a b/c"])
def test_an_odd_path_is_taken(path: str) -> None:
    assert only(f"diff --git a/{path} b/{path}\nold mode 100644\nnew mode 100755\n").path == path


def test_mail_text_after_a_file_without_hunks_is_noise() -> None:
    moved = "diff --git a/x b/y\nsimilarity index 100%\nrename from x\nrename to y\n"
    mail = "-- \n2.39.5\n\nrename from secret\nrename to z\nnew file mode 100644\n"
    plain = "--- a/p\n+++ b/p\n@@ -1 +1 @@\n-a\n+b\n"
    assert [(f.old_path, f.new_path, f.status) for f in parse(moved + mail + plain).files] == [
        ("x", "y", "renamed"),
        ("p", "p", "modified"),
    ]


def test_dev_null_without_mode_lines() -> None:
    added = "diff --git a/x b/x\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+b\n"
    assert (only(added).status, only(added).path) == ("added", "x")


def test_whole_diff_saved_with_crlf() -> None:
    file = only((HEAD + "@@ -1,2 +1,3 @@\n a\n+b\n\n").replace("\n", "\r\n"))
    assert (file.path, [text for *_, text in shown(file)]) == ("x", ["a\r", "b\r", "\r"])


def test_stripped_context_line_and_missing_last_newline() -> None:
    assert shown(only(HEAD + "@@ -1,2 +1,3 @@\n a\n\n+b")) == [
        (" ", 1, 1, "a"),
        (" ", 2, 2, ""),
        ("+", None, 3, "b"),
    ]


def test_bytes_that_are_not_utf8_are_latin1_in_content() -> None:
    head = b"\xef\xbb\xbf" + HEAD.encode()
    (hunk,) = only(head + b"@@ -0,0 +1 @@ d\xe9f\n+caf\xe9 \xc3\xa9 \0\n").hunks
    assert (hunk.section, hunk.lines[0].text) == ("déf", "café é �")


def test_unprintable_path_is_one_harmless_line() -> None:
    """Raw, such a path would write lines of its own into prompts and onto terminals.

    Shown to fail by returning the path unescaped from `_Parser._path`.
    """
    evil = r'"a/\n### y\033[31m\342\200\256"'
    diff = f"diff --git {evil} {evil.replace('a/', 'b/')}\n--- {evil}\n+++ {evil}\n"
    assert only(diff + "@@ -1 +1 @@\n-a\n+b\n").path == r"\u000a### y\u001b[31m\u202e"


@pytest.mark.parametrize(
    "names", [b"a/na\xefve b/na\xefve", rb'"a/na\357ve" "b/na\357ve"'], ids=["raw", "quoted"]
)
def test_a_path_that_is_not_utf8_is_shown_by_its_bytes(names: bytes) -> None:
    """One such file kept a whole change from being reviewed."""
    diff = b"diff --git " + names + b"\nnew file mode 100644\n--- /dev/null\n+++ "
    diff += names.split(b" ")[1] + b"\n@@ -0,0 +1 @@\n+b\n"
    assert parse(diff).files[0].path == r"na\xefve"


@pytest.mark.parametrize(
    ("diff", "expected"),
    [
        ("", "DIFF_EMPTY"),
        (b" \n\r\n", "DIFF_EMPTY"),
        ("hello\nworld\n", "DIFF_NOT_A_DIFF"),
        ("--- a\n+++ b\nno hunk\n", "DIFF_NOT_A_DIFF"),
        ("1c1\n< a\n---\n> b\n", "DIFF_NOT_A_DIFF"),
        ("diff --git is a command\n", "DIFF_NOT_A_DIFF"),
        (b"PK\3\4\0\0\0\0\0\0", "DIFF_NOT_A_DIFF"),
        ((HEAD + "@@ -1 +1 @@\n-a\n+b\n").encode("utf-16"), "DIFF_NOT_UTF8"),
        ("* Unmerged path x\n", "DIFF_MALFORMED"),
        ("@@ -1 +1 @@\n-a\n+b\n", "DIFF_MALFORMED"),
        (HEAD + "@@ -1 +1,2 @@\n-a\n+b\n", "DIFF_MALFORMED"),
        (HEAD + "@@ -1 +1 @@\n-a\n+b\n+c\n", "DIFF_MALFORMED"),
        (HEAD + "@@ -1 +1 @@\n-a\n+b\n-c\n", "DIFF_MALFORMED"),
        (HEAD + "@@ -1,2 +1 @@\n-a\n+b\n+c\n", "DIFF_MALFORMED"),
        (HEAD + "@@ -1 +1 @@\n*a\n+b\n", "DIFF_MALFORMED"),
        (HEAD + "@@ -1 +1 @@\n-a\n+b\n@@ -2 +x @@\n-a\n", "DIFF_MALFORMED"),
        (HEAD + "@@ -0,1 +0,1 @@\n-a\n+b\n", "DIFF_MALFORMED"),
        (HEAD + "@@ -1 +" + "9" * 5000 + " @@\n-a\n+b\n", "DIFF_MALFORMED"),
        ("diff --git a/x b/yy\nold mode 100644\nnew mode 100755\n", "DIFF_MALFORMED"),
        (HEAD.replace("x", "x" * 1025) + "@@ -1 +1 @@\n-a\n+b\n", "DIFF_MALFORMED"),
    ],
)
def test_refused(diff: str | bytes, expected: str) -> None:
    assert reason(diff) == expected


def test_a_merge_that_shows_no_diff_is_told_how_to_show_one() -> None:
    with pytest.raises(DiffError, match="git show -m --first-parent"):
        parse("commit 1f6589ec\nMerge: 2ac8988 258d68b\n\n    Merge branch 'stable'\n")


@pytest.mark.parametrize("where", ["+secret", " secret", "secret"])
def test_message_names_the_line_but_no_content(where: str) -> None:
    with pytest.raises(DiffError) as caught:
        parse(HEAD + f"@@ -1,1 +1,1 @@ secret\n-secret\n+secret\n{where}\n@@ -secret")
    assert "secret" not in str(caught.value)
    assert "Line " in str(caught.value)
    assert caught.value.__context__ is None


def test_mail_signature_after_the_last_hunk() -> None:
    assert len(shown(only(HEAD + "@@ -1 +1 @@\n-a\n+b\n-- \n2.39.5\n\n"))) == 2


TOKENS = st.sampled_from(
    [
        "diff --git a/x b/x",
        r'diff --git "a/\351" "b/\351"',
        "--- a/x",
        "--- /dev/null",
        "+++ b/x",
        "+++ /dev/null",
        "@@ -1 +1 @@",
        "@@ -1,2 +1,2 @@ f",
        "@@ -0,0 +1 @@",
        "@@ -",
        "-a",
        "+b",
        " c",
        "",
        "\r",
        r'rename from "a/\3"',
        r"\ No newline at end of file",
        "rename from x",
        "rename to y",
        "old mode 1",
        "new file mode 1",
        "Binary files a and b differ",
        "GIT binary patch",
        "-- ",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.text(), st.binary(), st.lists(TOKENS | st.text(max_size=8), max_size=14).map("\n".join)
    )
)
@example("diff --git \n")
@example("diff --git  \n--- \n+++ \n@@ -1 +1 @@\n")
@example("\ud800")
def test_nothing_but_diff_errors(diff: str | bytes) -> None:
    try:
        parsed = parse(diff)
    except DiffError:
        return
    for file in parsed.files:
        assert 0 < len(file.path.encode()) <= diffs.MAX_PATH_BYTES
        for hunk in file.hunks:
            assert [x.new_no for x in hunk.lines if x.kind != "-"] == list(hunk.new_lines)
            assert sum(x.kind != "+" for x in hunk.lines) == hunk.old_len


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"])), min_size=1
    ),
    st.lists(
        st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"])), min_size=1
    ),
)
def test_git_diff_round_trip(
    tmp_path_factory: pytest.TempPathFactory, old: list[str], new: list[str]
) -> None:
    """The sides of a parsed full-context diff are the files that git compared."""
    if old == new:
        return
    folder = tmp_path_factory.mktemp("pair")
    for name, lines in (("old", old), ("new", new)):
        (folder / name).write_bytes("\n".join(lines).encode())
    out = subprocess.run(
        ["git", "diff", "--no-index", "--text", "-U99999", "old", "new"],
        cwd=folder,
        check=False,
        capture_output=True,
        timeout=30,
    ).stdout
    parsed = [x for h in only(out).hunks for x in h.lines]

    def side(other: str) -> str:
        return "".join(x.text + "\n" * (not x.no_newline) for x in parsed if x.kind != other)

    assert (side("+"), side("-")) == ("\n".join(old), "\n".join(new))
