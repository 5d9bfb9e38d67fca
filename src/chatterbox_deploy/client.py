"""What whoever asks a server over HTTP has to know: its address, the key, why it does not answer. Asks nobody."""

from __future__ import annotations

import os
import socket
import ssl
from urllib.parse import urlsplit


def base_url(text: str) -> str | None:
    """A server's address, as people give it (also with the ``/v1`` of OpenAI's clients); ``None``: it is none."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return None
    if not good or parts.query or parts.fragment:
        return None
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def authorization(key: str | None) -> dict[str, str]:
    """The header that carries an API key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def why(error: Exception) -> str:
    """Why nobody answered, in a few words; also what aiohttp has wrapped."""
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    if isinstance(cause, ssl.SSLError):
        # Their errno is OpenSSL's, which means something else to strerror(3).
        said = getattr(cause, "verify_message", None) or (cause.reason or str(cause)).replace("_", " ")
        return f"TLS: {said.lower()}"
    if isinstance(cause, socket.gaierror) and cause.strerror:
        return cause.strerror.lower()
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno).lower()
    return str(cause) or type(error).__name__
