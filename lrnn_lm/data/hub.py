"""Whether the Hugging Face hub can be reached: asked before its libraries spend a minute on retries."""

import socket
import urllib.parse
import urllib.request

_PATIENCE = 5.0  # seconds for a connection


def hub_is_reachable() -> bool:
    """False in offline mode or if nothing answers at the hub's address; True behind a proxy: who can tell."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        socket.create_connection((hub.hostname, port), _PATIENCE).close()
    except OSError:
        return False
    return True
