"""Whether the Hugging Face hub can be reached: asked before its libraries spend a minute on retries."""

import socket
import urllib.parse
import urllib.request


def hub_is_reachable() -> bool:
    """False in offline mode or if the hub's name does not resolve; behind a proxy nobody can tell: True."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
