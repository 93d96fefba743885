"""Which files hold a secret well enough to be read."""

from __future__ import annotations

import os

import pytest
from byokeep.identity import open_to_others

# Modes by whether the file is ours, and its group one of ours.
_CLOSED = {
    (True, True): (0o400, 0o600),
    (True, False): (0o400, 0o600),
    (False, True): (
        0o400,
        0o440,
        0o600,
        0o640,
    ),  # Kubernetes' Secret: root's, group-readable for the pod
    (False, False): (0o400, 0o600),
}


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("our_group", [True, False])
@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640, 0o460, 0o660, 0o404, 0o444, 0o644])
def test_a_groups_read_is_fine_in_another_owners_file_of_our_group(
    tmp_path, monkeypatch, ours, our_group, mode
):
    file = tmp_path / "secret"
    file.touch()
    file.chmod(mode)
    owner, group = file.stat().st_uid, file.stat().st_gid
    monkeypatch.setattr(os, "geteuid", lambda: owner if ours else owner + 1)
    monkeypatch.setattr(os, "getegid", lambda: group + 1)
    monkeypatch.setattr(os, "getgroups", lambda: [group] if our_group else [group + 1])
    assert open_to_others(file) == (mode not in _CLOSED[ours, our_group])
