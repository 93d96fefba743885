"""A customer of the stack as it is meant: adds a key, has a diff reviewed on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from byokeep.client import Connection
from byokeep.ids import new_id
from byokeep.names import key_name, provider_value
from byokeep.orchestrator.v1 import key_pb2, review_pb2, settings_pb2

from deploy.local.prove.attack import NotShownError

_SECONDS = 60.0
_DIFF = b"""diff --git a/app.py b/app.py
--- a/app.py
+++ b/app.py
@@ -1,2 +1,3 @@
 def load(query, name):
+    return eval(query)
     return None
"""


@dataclass(frozen=True, slots=True)
class Customer:
    """One key of tenant demo, added and used through the whole stack."""

    key_id: str
    model: str
    key: str = field(repr=False)
    prefix: str = "sk-proj-"

    @classmethod
    def new(cls, connect: Callable[[], Connection], key: str) -> Self:
        """Add a key of openai and have a review run on it.

        Raises NotShownError where that fails, and so nothing was used; grpc.RpcError.
        """
        key_id, request_id = new_id("key"), new_id("req")
        with connect() as connection:
            connection.keys.AddKey(
                key_pb2.AddKeyRequest(
                    parent=connection.parent,
                    key_id=key_id,
                    provider=provider_value("openai"),
                    display_name=f"prove-{key_id[-8:]}",
                    sealed_key=connection.seal("openai", key, key_id, "add", request_id),
                    request_id=request_id,
                )
            )
            name = key_name(connection.tenant, key_id)
            for _ in connection.keys.WatchKey(key_pb2.WatchKeyRequest(name=name), timeout=_SECONDS):
                pass
            customer = cls(key_id, _model(connection), key)
        done = customer.review(connect)
        if done.state != review_pb2.REVIEW_STATE_COMPLETED:
            raise NotShownError("the customer's own review failed")
        return customer

    def submit(self, connection: Connection) -> review_pb2.Review:
        """Ask for a review of a small diff."""
        request = review_pb2.SubmitReviewRequest(
            parent=connection.parent,
            input=review_pb2.ReviewInput(repository="acme/shop", diff=_DIFF, model=self.model),
            request_id=new_id("req"),
        )
        return connection.reviews.SubmitReview(request).review

    def review(self, connect: Callable[[], Connection]) -> review_pb2.Review:
        """Have a small diff reviewed; return the review as it ended."""
        with connect() as connection:
            last = self.submit(connection)
            watched = review_pb2.WatchReviewRequest(name=last.name)
            for message in connection.reviews.WatchReview(watched, timeout=_SECONDS):
                last = message.review
        return last


def _model(connection: Connection) -> str:
    request = settings_pb2.ListModelsRequest(parent=connection.parent)
    return next(
        one.model
        for one in connection.settings.ListModels(request).models
        if one.model.startswith("openai/") and one.provider_default
    )
