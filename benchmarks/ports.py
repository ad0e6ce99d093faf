"""A port that nothing listens on, for a server or a group of processes."""

from __future__ import annotations

import socket


def free_port() -> int:
    """One that was free just now on the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
