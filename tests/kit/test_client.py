"""Where a server is, and why it does not answer."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import aiohttp
import pytest

from chatterbox_deploy import client


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:6095", "http://127.0.0.1:6095"),
        ("http://127.0.0.1:6095/", "http://127.0.0.1:6095"),
        ("https://tts.example.com/v1", "https://tts.example.com"),
        ("https://example.com/tts/v1/", "https://example.com/tts"),
        ("http://[::1]:6095", "http://[::1]:6095"),
        ("tts.example.com", None),
        ("127.0.0.1:6095", None),
        ("http://", None),
        ("http://127.0.0.1:0", None),
        ("http://127.0.0.1:x", None),
        ("http://127.0.0.1:70000", None),
        ("http://[::1", None),
        ("http://a/v1?key=secret", None),
        ("ftp://a", None),
    ],
)
def test_a_server_is_named_by_its_address(given: str, url: str | None) -> None:
    assert client.base_url(given) == url


def fails(url: str) -> str:
    async def ask() -> str:
        async with aiohttp.ClientSession() as session:
            try:
                async with session.get(url, timeout=aiohttp.ClientTimeout(total=10)):
                    return "it answers"
            except (aiohttp.ClientError, OSError) as error:
                return client.why(error)

    return asyncio.run(ask())


def test_why_nobody_answers_is_said_in_words() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as plain:
        serving = threading.Thread(target=plain.handle_request)
        serving.start()
        assert fails(f"https://127.0.0.1:{plain.server_port}").startswith("TLS: ")
        serving.join()
        taken = plain.server_port
    assert fails(f"http://127.0.0.1:{taken}") == "connection refused"
    # What a resolver says differs from one machine to the next; it is not errno's text.
    assert "unknown error" not in fails("http://nosuch.invalid")
