"""56: nothing ambient changes what `byokeep review` reads: no configuration, attribute, flag of the
index or environment variable. And what it reads is of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from byokeep.cli.base.errors import CliError
from byokeep.cli.reviews import gitdiff, gitinfo

LIMIT = 2**20
APP = b"".join(b"line %d\n" % number for number in range(40))
CHANGED = APP.replace(b"line 9\n", b"line nine\n").replace(b"line 15\n", b"")
Reading = tuple[bytes, bytes]


def git(*arguments: str, **more: str) -> bytes:
    return subprocess.run(
        [shutil.which("git") or "git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
        check=True,
        capture_output=True,
        timeout=30,
        env={**os.environ, **more},
    ).stdout


def reads() -> Reading:
    """What a review of the branch reads, and one of what is not committed."""
    found = gitinfo.checkout()
    assert found is not None
    return gitdiff.between(found, "main", LIMIT), gitdiff.uncommitted(found, LIMIT)[0]


def write(path: str, content: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def change() -> None:
    """The change that is reviewed: files of several kinds, in folders, one of them renamed."""
    write("api/app.py", CHANGED)
    write("größe b.py", b"x = 2\r\n")
    write("new/name.py", APP + b"more\n")
    write("new/added.py", b"$Id$\n\tadded  \n")
    Path("old.py").unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, and none of the caller's variables of git."""
    folder = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A branch whose commits change what its work tree then changes again."""
    root = tmp_path / "shop"
    root.mkdir()
    monkeypatch.chdir(root)
    git("init", "-q", "-b", "main", ".")
    write("api/app.py", APP)
    write("größe b.py", b"x = 1\r\n")
    write("old.py", APP)
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    git("checkout", "-q", "-b", "topic")
    change()
    git("add", "-A")
    git("commit", "-q", "-m", "two")
    write("api/app.py", CHANGED + b"again\n")
    write("größe b.py", b"x = 3\r\n")
    write("staged.py", b"s = 1\n")
    git("add", "staged.py")
    return root


def test_what_is_read(checkout: Path) -> None:
    branch, tree = reads()
    assert branch.count(b"diff --git ") == 4
    assert all(
        part in branch for part in (b"+line nine", b"-line 15", b"+x = 2\r", b"+more", b"+$")
    )
    assert b"rename from old.py" in branch
    assert tree.count(b"diff --git ") == 3
    assert all(part in tree for part in (b"+again", b"+x = 3\r", b"+s = 1"))


#: Settings that decide what git itself shows; a value may name the program of `program`.
CONFIGURED = {
    "diff.relative": "true",
    "diff.noprefix": "true",
    "diff.mnemonicPrefix": "true",
    "diff.external": "PROGRAM",
    "diff.context": "0",
    "diff.interHunkContext": "9",
    "diff.renames": "false",
    "diff.algorithm": "patience",
    "diff.orderFile": "ORDER",
    "core.attributesFile": "ATTRIBUTES",
    "core.autocrlf": "input",
    "core.bigFileThreshold": "1",
    "core.quotePath": "false",
    "core.fileMode": "false",
    "color.ui": "always",
    "include.path": "INCLUDED",
}


def _value(checkout: Path, name: str) -> str:
    value = CONFIGURED[name]
    return str(checkout.parent / value.lower()) if value.isupper() else value


@pytest.mark.parametrize("place", ["--local", "--global", "environment"])
def test_no_setting_that_decides_what_git_shows(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Shown to fail with the checkout's own repository instead of a private one."""
    write("../program", b"#!/bin/sh\necho owned\n")
    Path("../program").chmod(0o755)
    write("../order", b"staged.py\nnew/*\n")
    write("../attributes", b"* -diff\n")
    write("../included", b"[diff]\nnoprefix = true\n")
    monkeypatch.chdir("api")
    before = reads()
    for name in CONFIGURED:
        value = _value(checkout, name)
        if place == "environment":
            monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
            monkeypatch.setenv("GIT_CONFIG_KEY_0", name)
            monkeypatch.setenv("GIT_CONFIG_VALUE_0", value)
        else:
            git("config", place, name, value)
        assert reads() == before, name
        if place != "environment":
            git("config", place, "--unset", name)


def test_no_setting_that_git_knows(checkout: Path) -> None:
    """Each that could have a say: what is read is the same, or git refuses."""
    sections = ("attr", "core", "diff", "extensions", "index", "submodule")
    known = git("help", "--config").decode().split()
    names = [name for name in known if name.split(".")[0] in sections and "*" not in name]
    names = [name.replace("<driver>", "x").replace("<name>", "x") for name in names]
    assert len(names) > 80
    before, plain = reads(), (checkout / ".git" / "config").read_text()
    head = git("rev-parse", "HEAD").decode().strip()

    def configure(chosen: list[str], value: str) -> None:
        config = ""
        for name in chosen:
            section, _, key = name.rpartition(".")
            head, _, sub = section.partition(".")
            config += f'[{head} "{sub}"]' if sub else f"[{head}]"
            config += f"\n{key} = {value}\n"
        (checkout / ".git" / "config").write_text(plain + config)

    def refused(name: str, value: str) -> bool:
        configure([name], value)
        try:
            found = gitinfo.checkout()
        except CliError:
            return True
        return found is None or found.head() != head

    without_effect: set[str] = set()
    for value in ("true", "1", "/dev/null"):
        taken = [name for name in names if not refused(name, value)]
        configure(taken, value)
        assert reads() == before, value
        without_effect.update(taken)
    assert set(names) - without_effect <= {
        *("core.abbrev", "core.bare", "core.checkStat", "core.createObject", "core.worktree"),
        "extensions.objectFormat",
    }


VARIABLES = {
    "GIT_DIFF_OPTS": "--unified=0",
    "GIT_EXTERNAL_DIFF": "/bin/echo",
    "GIT_DIR": "/nowhere",
    "GIT_WORK_TREE": "/tmp",
    "GIT_COMMON_DIR": "/nowhere",
    "GIT_INDEX_FILE": "/nowhere/index",
    "GIT_OBJECT_DIRECTORY": "/nowhere",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES": "/nowhere",
    "GIT_CONFIG_PARAMETERS": "'diff.noprefix=true'",
    "GIT_CONFIG_GLOBAL": "/nowhere",
    "GIT_ATTR_SOURCE": "HEAD",
    "GIT_NAMESPACE": "x",
    "GIT_SHALLOW_FILE": "/nowhere",
    "GIT_GRAFT_FILE": "/nowhere",
    "GIT_CEILING_DIRECTORIES": "/",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_ICASE_PATHSPECS": "1",
    "GIT_DEFAULT_HASH": "sha256",
    "GIT_REPLACE_REF_BASE": "refs/heads/",
    "GIT_TRACE": "1",
    "GIT_PAGER": "false",
    "LC_ALL": "de_DE.UTF-8",
    "XDG_CONFIG_HOME": "/nowhere",
    "HOME": "/nowhere",
}


def test_no_variable(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = reads()
    for name, value in VARIABLES.items():
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            assert reads() == before, name


#: What a change may say of its own files.
ATTRIBUTES = [
    *("* -diff", "* binary", "api/** -diff", "* diff=x", "* filter=x", "* ident", "* text=auto"),
    *("* text eol=lf", "* working-tree-encoding=UTF-16", "* crlf=input", "[attr]q -diff\n* q"),
]


@pytest.mark.parametrize("where", [".gitattributes", "api/.gitattributes", ".git/info/attributes"])
def test_no_attribute(checkout: Path, where: str) -> None:
    """Of the change itself or of the repository. Shown to fail with no attributes of our own."""
    git("config", "diff.x.textconv", "echo")
    git("config", "diff.x.binary", "true")
    git("config", "filter.x.clean", "cat /dev/null")
    before = reads()
    for line in ATTRIBUTES:
        write(where, line.encode() + b"\n")
        assert reads() == before, line
        if not where.startswith(".git/"):
            blob = git("hash-object", "-w", "--no-filters", where).decode().strip()
            git("update-index", "--add", "--cacheinfo", f"100644,{blob},{where}")
            git("commit", "-q", "-m", "attributes")
            branch = reads()[0]
            assert all(part in branch for part in before[0].split(b"diff --git ")), line
            git("reset", "-q", "--soft", "HEAD~")
            git("reset", "-q", where)


def test_no_attributes_of_the_user(checkout: Path, home: Path) -> None:
    before = reads()
    write(str(home / ".config/git/attributes"), b"* -diff\n")
    assert reads() == before


@pytest.mark.parametrize("flag", ["--assume-unchanged", "--skip-worktree"])
def test_no_flag_of_the_index(checkout: Path, flag: str) -> None:
    """Shown to fail without `_HIDING`."""
    before = reads()
    git("update-index", flag, "api/app.py", "größe b.py")
    assert b"again" not in git("diff", "HEAD")
    assert reads() == before


def test_a_sparse_checkout_has_deleted_nothing(checkout: Path) -> None:
    git("reset", "-q", "--hard")
    git("sparse-checkout", "set", "api")
    assert not (checkout / "new").exists()
    write("api/app.py", b"gone\n")
    tree = reads()[1]
    assert (tree.count(b"diff --git"), b"+gone" in tree) == (1, True)


def test_a_change_in_the_second_of_a_commit_is_seen(checkout: Path) -> None:
    """git compares times by seconds. Shown to fail with an index of a later one."""
    while True:
        write("api/app.py", b"first\n")
        begun = int(Path("api/app.py").stat().st_ctime)
        git("commit", "-q", "--allow-empty", "-m", "first", "api/app.py")
        write("api/app.py", b"other\n")
        if int(Path("api/app.py").stat().st_ctime) == begun:
            break
    time.sleep(1.01)
    assert b"+other" in reads()[1]


@pytest.mark.parametrize("ignore", ["all", "untracked", "dirty"])
def test_no_submodule_says_that_it_is_to_be_ignored(checkout: Path, ignore: str) -> None:
    """Shown to fail without --ignore-submodules."""
    git("init", "-q", "-b", "main", "lib")
    for message in ("one", "two"):
        git("-C", "lib", "commit", "-q", "--allow-empty", "-m", message)
    modules = f'[submodule "lib"]\npath = lib\nurl = ./lib\nignore = {ignore}\n'
    write(".gitmodules", modules.encode())
    git("add", "lib", ".gitmodules")
    git("commit", "-q", "-m", "submodule")
    git("-C", "lib", "reset", "-q", "--hard", "HEAD~")
    git("config", "submodule.lib.ignore", ignore)
    assert b"+Subproject commit" in reads()[1]
    git("add", "-f", "lib")
    git("commit", "-q", "-m", "back", "lib")
    assert b"+Subproject commit" in reads()[0]


def test_no_replacement_or_graft(checkout: Path) -> None:
    before = reads()
    git("replace", "HEAD:api/app.py", "main:api/app.py")
    git("replace", "HEAD", "main")
    assert reads() == before
    git("replace", "-d", git("rev-parse", "HEAD").decode().strip())
    write(".git/info/grafts", git("rev-parse", "HEAD"))
    assert reads() == before


@pytest.mark.parametrize("format_", ["sha1", "sha256"])
@pytest.mark.parametrize("how", ["folder", "worktree", "split index"])
def test_every_kind_of_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, how: str, format_: str
) -> None:
    before = reads()
    if format_ == "sha256":
        shutil.rmtree(".git")
        git("init", "-q", "-b", "main", "--object-format=sha256", ".")
        git("commit", "-q", "--allow-empty", "-m", "one")
        git("checkout", "-q", "-b", "topic")
        git("add", "-A")
        git("commit", "-q", "-m", "two")
        change()
        before = reads()
        assert b"+line nine" in before[0]
    if how == "folder":
        monkeypatch.chdir("new")
    elif how == "split index":
        git("update-index", "--split-index")
    else:
        git("stash", "-q")
        git("checkout", "-q", "main")
        git("worktree", "add", "-q", "../second", "topic")
        monkeypatch.chdir("../second")
        git("stash", "apply", "-q", "--index")
    assert reads() == before


def test_a_shallow_clone_has_its_borders(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    branch = reads()[0]
    git("checkout", "-q", "-f", "main")
    git("commit", "-q", "--allow-empty", "-m", "zero")
    for depth, found in (("2", True), ("1", False)):
        clone = tmp_path / f"clone{depth}"
        git("clone", "-q", "--no-single-branch", f"--depth={depth}", f"file://{checkout}", clone)
        monkeypatch.chdir(clone)
        git("checkout", "-q", "topic")
        here = gitinfo.checkout()
        assert here is not None
        if found:
            assert gitdiff.between(here, "main", LIMIT) == branch
        else:
            with pytest.raises(CliError, match="no commit in common"):
                gitdiff.between(here, "main", LIMIT)


def test_a_partial_clone_is_told_what_gets_the_rest(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """git would fetch it, with what the clone's configuration names."""
    branch = reads()[0]
    git("config", "uploadpack.allowFilter", "true")
    git("clone", "-q", "-b", "topic", "--filter=blob:none", f"file://{checkout}", "../partial")
    monkeypatch.chdir("../partial")
    here = gitinfo.checkout()
    assert here is not None
    with pytest.raises(CliError) as refused:
        gitdiff.between(here, "origin/main", LIMIT)
    assert "unable to read" in refused.value.message
    git(*refused.value.hint.partition(": git ")[2].split())
    assert gitdiff.between(here, "origin/main", LIMIT) == branch


@pytest.mark.parametrize("moved", ["..", "../other", "/"])
def test_a_checkout_that_moves_its_work_tree_is_refused(checkout: Path, moved: str) -> None:
    (checkout.parent / "other").mkdir()
    git("config", "core.worktree", str((checkout / moved).resolve()))
    with pytest.raises(CliError, match="moves its work tree"):
        gitinfo.checkout()


def test_a_bare_repository_in_the_checkout_is_not_asked(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration would be the author's of the change."""
    before = reads()
    git("init", "-q", "--bare", "bare")
    git("-C", "bare", "config", "core.worktree", "/")
    monkeypatch.chdir("bare")
    assert reads() == before


def test_a_name_of_two_things_is_refused(checkout: Path) -> None:
    git("tag", "main", "HEAD")
    with pytest.raises(CliError, match="several things"):
        reads()


def test_a_nul_hides_no_text(checkout: Path) -> None:
    """Shown to fail without `_textual`."""
    write("api/app.py", APP.replace(b"line 3\n", b"line \0 3\nos.system(x)\n"))
    write("logo.png", bytes(range(256)) * 40)
    write("new/name.py", b"# \0\n" + APP)
    git("mv", "staged.py", "*.py")
    write("*.py", b"s = 2 # \0\n")
    git("add", "-A")
    git("commit", "-q", "-m", "binary")
    branch = reads_branch()
    assert b"+os.system(x)" in branch
    assert b"+s = 2" in branch
    assert b"+# \0" in branch
    assert branch.count(b"Binary files ") == 1
    assert {line for line in branch.split(b"\n") if line.startswith(b"diff --git a/")} >= {
        b"diff --git a/api/app.py b/api/app.py",
        b"diff --git a/logo.png b/logo.png",
    }


def reads_branch() -> bytes:
    found = gitinfo.checkout()
    assert found is not None
    return gitdiff.between(found, "main", LIMIT)


def test_too_much_is_not_kept_in_memory(checkout: Path) -> None:
    write("new/added.py", b"x" * 3_000_000)
    found = gitinfo.checkout()
    assert found is not None
    assert len(gitdiff.uncommitted(found, 1000)[0]) == 1001
