"""What the anchor says, as the one short text that its store keeps."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from services.common.config import ConfigError
from services.keyvault import merkle


@dataclass(frozen=True, slots=True)
class Position:
    """A position of the log: how many leaves, and the root over them."""

    size: int = 0
    root: bytes = merkle.EMPTY
    #: Leaves before this one were accepted by an operator and are not held against chains.
    accepted: int = 0
    #: How often an operator has resumed leases: replicas and snapshots follow it.
    resumed: int = 0
    #: The database was found to contradict this, and no operator has resumed leases since.
    distrusted: bool = False

    def text(self, deployment: str) -> str:
        """Return the anchor's text."""
        return json.dumps({"deployment": deployment, **asdict(self), "root": self.root.hex()})


def read(text: str | None, deployment: str) -> Position | None:
    """Return the position of an anchor's text; None for none.

    Raises:
        ConfigError: it is no anchor, or another deployment's.
    """
    if text is None:
        return None
    try:
        data = json.loads(text)
        if data["deployment"] != deployment:
            raise ValueError
        return Position(
            int(data["size"]),
            bytes.fromhex(data["root"]),
            int(data["accepted"]),
            int(data.get("resumed", 0)),
            bool(data.get("distrusted", False)),
        )
    except (ValueError, KeyError, TypeError):
        raise ConfigError("the anchor's text is not an anchor of this deployment") from None
