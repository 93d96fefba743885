"""Does nothing until it is told to end: a pod to call from (`kubectl exec`)."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
