"""`make prove`: attacks on a running stack, for real, each with what stopped it."""

from __future__ import annotations
