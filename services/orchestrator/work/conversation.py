"""The conversation with a runner about one attempt: what it may say when, and what we say then.

We speak first, with Assign, or with Reattach where the attempt runs already. Then:

    ASSIGNED ── accepted ──▶ GRANTED ── leased ──▶ LEASED ── call_started ──▶ CALLING
       we say Proceed, with the grant                ▲       we store it, and say Ack │
                                                     ├── chunk_result, chunk_split ◀──┤
                                                     │   we store it, and say Ack     │
                                          (a key's)  JUDGED ◀── validation_result ────┘

An outcome ends it in any state; we store the end, and say Ack. Who wants no more of it says Cancel,
and is STOPPING: what comes then is not stored, until the outcome. A stream that breaks in a call is
taken up again with Reattach by the same worker, which knows where it was, or by another (RESUMED),
which hears again what the first did not acknowledge, and says no Proceed.

Whatever else a runner says is out of turn: it has a defect, or is none of ours. The attempt ends
with that.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, TypeAlias


class Frame(enum.StrEnum):
    """What a runner says: the names of ExecuteResponse's messages."""

    ACCEPTED = "accepted"
    LEASED = "leased"
    CALL_STARTED = "call_started"
    CALL_PROGRESS = "call_progress"
    CHUNK_RESULT = "chunk_result"
    CHUNK_SPLIT = "chunk_split"
    VALIDATION_RESULT = "validation_result"
    OUTCOME = "outcome"


class State(enum.Enum):
    """Where a conversation is."""

    #: The runner knows the attempt, and makes a child.
    ASSIGNED = enum.auto()
    #: It has the grant, and asks keyvault for the key.
    GRANTED = enum.auto()
    #: The child has the key; no call is open.
    LEASED = enum.auto()
    #: A provider call is announced, or made.
    CALLING = enum.auto()
    #: The provider's word on a key is known.
    JUDGED = enum.auto()
    #: Taken over from a worker that fell silent in a call.
    RESUMED = enum.auto()
    #: Nothing more is wanted of it.
    STOPPING = enum.auto()
    ENDED = enum.auto()


Transitions: TypeAlias = Mapping[State, Mapping[Frame, State]]

_BEGINNING: Final[Transitions] = {
    State.ASSIGNED: {Frame.ACCEPTED: State.GRANTED},
    State.GRANTED: {Frame.LEASED: State.LEASED},
}
#: An outcome is heard in each of these states; once they have ended, nothing is.
REVIEW: Final[Transitions] = {
    **_BEGINNING,
    State.LEASED: {
        Frame.CALL_STARTED: State.CALLING,
        # Of a length that was too long before: no call was made for it.
        Frame.CHUNK_SPLIT: State.LEASED,
        # Passed by without a number, it may come after the result.
        Frame.CALL_PROGRESS: State.LEASED,
    },
    State.CALLING: {
        Frame.CALL_PROGRESS: State.CALLING,
        Frame.CHUNK_RESULT: State.LEASED,
        Frame.CHUNK_SPLIT: State.LEASED,
    },
    State.RESUMED: {
        Frame.ACCEPTED: State.RESUMED,
        Frame.LEASED: State.RESUMED,
        Frame.CALL_STARTED: State.CALLING,
        Frame.CALL_PROGRESS: State.RESUMED,
        Frame.CHUNK_RESULT: State.LEASED,
        Frame.CHUNK_SPLIT: State.LEASED,
    },
    State.STOPPING: dict.fromkeys(Frame, State.STOPPING),
}
KEY: Final[Transitions] = {
    **_BEGINNING,
    State.LEASED: {Frame.CALL_STARTED: State.CALLING},
    State.CALLING: {Frame.VALIDATION_RESULT: State.JUDGED},
    # Heard again where the stream broke before the outcome came.
    State.JUDGED: {Frame.VALIDATION_RESULT: State.JUDGED},
    State.STOPPING: dict.fromkeys(Frame, State.STOPPING),
}


class OutOfTurn(Exception):
    """A runner said what it may not say now."""

    def __init__(self, frame: str, state: State) -> None:
        """`frame` is empty for a message that we don't know."""
        super().__init__(f"{frame or 'an unknown message'} while {state.name}")


class Conversation:
    """Where one conversation is."""

    def __init__(self, transitions: Transitions, *, resumed: bool = False) -> None:
        """`resumed`: another worker began it."""
        self._transitions = transitions
        self.state = State.RESUMED if resumed else State.ASSIGNED
        #: Whether nothing more was wanted of it, at some time.
        self.stopped = False

    def hear(self, name: str) -> Frame:
        """Go on with what the runner said, by the name of the message. Raises OutOfTurn."""
        following = self._transitions.get(self.state, {})
        if name == Frame.OUTCOME and self.state is not State.ENDED:
            self.state = State.ENDED
        elif name in following:
            self.state = following[Frame(name)]
        else:
            raise OutOfTurn(name, self.state)
        return Frame(name)

    def stop(self) -> None:
        """Want no more of it."""
        self.stopped = True
        if self.state is not State.ENDED:
            self.state = State.STOPPING
