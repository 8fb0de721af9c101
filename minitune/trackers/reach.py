"""Reach of a server, tried before a run counts on it."""

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

REACH_S = 10.0  # a server that takes no connection in this time is taken for absent


def unreachable(address: str) -> str | None:
    """Why no connection to the server of a http address can be made; None if one can, or if a proxy
    makes it."""
    host = urlsplit(address)
    if {"http", "https", "all"} & set(getproxies()):
        return None
    port = host.port or (80 if host.scheme == "http" else 443)
    try:
        socket.create_connection((str(host.hostname), port), timeout=REACH_S).close()
    except OSError as error:
        return str(error)
    return None
