"""The socket pair between parent and child."""

from __future__ import annotations

import asyncio
import socket

import pytest
from byokeep.orchestrator.v1 import key_pb2

from services.llm_runner import channel
from services.llm_runner.channel import ChannelClosedError, ChildEnd, Kind, ParentEnd


def ends():
    ours, theirs = socket.socketpair()
    return ParentEnd(ours), theirs


async def test_a_channel_passes_large_frames_and_sockets():
    parent, theirs = ends()
    child = ChildEnd(theirs)
    large = bytes(range(256)) * 20_000
    received = asyncio.create_task(asyncio.to_thread(child.receive, Kind.ASSIGN))
    await parent.send(Kind.ASSIGN, large)
    assert await received == large

    one, other = socket.socketpair()
    with one, other:
        parent.answer(Kind.DIALLED, sock=one)
        passed = child.receive_dialled()
        with passed:
            passed.send(b"x")
            assert other.recv(1) == b"x"
    parent.answer(Kind.DIALLED, b"\x02")
    assert child.receive_dialled() == key_pb2.UNREACHABLE_CAUSE_CONNECT

    child.send(Kind.END, b"1234")
    child.send(Kind.END)
    assert await parent.receive() == (Kind.END, b"1234")
    assert await parent.receive() == (Kind.END, b"")
    theirs.close()
    with pytest.raises(ChannelClosedError):
        await parent.receive()
    parent.close()


@pytest.mark.parametrize("data", [b"\0\0\0\0\xff", b"\xff\xff\xff\xff\x17", b"\0\0"])
async def test_what_is_no_frame_ends_the_attempt(data):
    parent, theirs = ends()
    theirs.sendall(data)
    theirs.close()

    with pytest.raises(ChannelClosedError):
        await parent.receive()
    parent.close()


@pytest.mark.parametrize("event", ["hang up", "wrong frame", "hang up in a wait"])
def test_the_child_ends_itself_without_a_parent(monkeypatch, event):
    class Vanished(BaseException):
        pass

    def vanish():
        raise Vanished

    monkeypatch.setattr(channel, "vanish", vanish)
    ours, theirs = socket.socketpair()
    with theirs:
        child = ChildEnd(theirs)
        if event == "wrong frame":
            ours.sendall(b"\0\0\0\0\x03")
        else:
            ours.close()
        with pytest.raises(Vanished):
            child.wait(None, 0, 30) if event == "hang up in a wait" else child.receive(Kind.ACK)
        ours.close()
