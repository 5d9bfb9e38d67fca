"""Who may ask: API keys from a file, and the door that wants one. Logs nothing, and never repeats what a line holds."""

import hashlib
import hmac
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from chatterbox_server import problems

OPEN: Final = frozenset(("/healthz", "/readyz", "/health"))
"""Paths that need no key: whoever probes has none, and they tell nothing that was said.

``/metrics`` is not among them, for it tells who uses what: Prometheus sends a key (``authorization`` of its
``scrape_config``), so there is one rule, whatever address the port is bound to.
"""

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_KEY: Final = re.compile(r"[!-~]{16,256}")


class KeysError(Exception):
    """The file cannot be used; holds every problem, by line, and no word of the file: a misplaced word may be a key."""

    def __init__(self, path: Path, problems: tuple[str, ...]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join((f"cannot use the API keys: {path} has {count}", *problems)))


class Keys:
    """The keys of a file with a ``NAME KEY`` on each line; ``#`` begins a line that is a comment.

    What is kept is the SHA-256 of each key. That is enough, without salt or repetition, for a random key cannot be
    guessed from it, and a memory dump does not hold it.
    """

    def __init__(self, path: Path) -> None:
        """Raises ``KeysError``."""
        self._path = path
        self._names: dict[bytes, str] = {}
        self.reload()

    @property
    def names(self) -> tuple[str, ...]:
        """Who has a key, in the file's order."""
        return tuple(self._names.values())

    def reload(self) -> None:
        """Read the file again.

        Raises:
            KeysError: the file cannot be used; the keys read before stay.
        """
        try:
            text = self._path.read_bytes().decode("utf-8-sig", "replace")
        except OSError as error:
            raise KeysError(self._path, (f"cannot be read: {error.strerror}",)) from None
        self._names = _parsed(self._path, text)

    def name_of(self, authorization: str | None) -> str | None:
        """Whose key the value of an ``Authorization`` header holds; ``None``: nobody's.

        Every key is compared, to its end, also after one has matched: how long that takes tells neither how much
        of a guess was right nor where in the file a key stands.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        asked = _digest(key.strip())
        found: str | None = None
        for digest, name in self._names.items():
            if hmac.compare_digest(digest, asked):
                found = name
        return found


class RequireKey:
    """Answers 401 to whoever has no key; what is behind it finds the key's name in ``scope["state"]["client"]``.

    It stands inside of the middleware for CORS: a browser's preflight request never carries a key.
    """

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Collection[str] = OPEN) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("authorization")
        name = self._keys.name_of(given)
        if name is not None:
            scope.setdefault("state", {})["client"] = name
            await self._app(scope, receive, send)
            return
        said = "there is no such API key" if given else "an API key is needed"
        message = f"{said}: send a key of this server as `Authorization: Bearer KEY`"
        headers = {"WWW-Authenticate": "Bearer"}
        await problems.problem(401, message, code="invalid_api_key", headers=headers)(scope, receive, send)


def _parsed(path: Path, text: str) -> dict[bytes, str]:
    """Names by the digest of their key."""
    wrong: list[str] = []
    keys: dict[bytes, str] = {}
    names_at: dict[str, int] = {}
    keys_at: dict[bytes, int] = {}
    for number, words in _lines(text):
        if len(words) != 2:
            words_said = "1 word" if len(words) == 1 else f"{len(words)} words"
            wrong.append(f"line {number}: should be NAME KEY, has {words_said}")
            continue
        name, key = words
        digest = _digest(key)
        if not _NAME.fullmatch(name):
            wrong.append(f"line {number}: the name should be 1 to 64 of the characters A-Z a-z 0-9 _ . -")
        elif name in names_at:
            wrong.append(f"line {number}: the name is that of line {names_at[name]}")
        if not _KEY.fullmatch(key):
            wrong.append(f"line {number}: the key should be 16 to 256 printable ASCII characters")
        elif digest in keys_at:
            wrong.append(f"line {number}: the key is that of line {keys_at[digest]}")
        names_at.setdefault(name, number)
        keys_at.setdefault(digest, number)
        keys[digest] = name
    if not keys and not wrong:
        wrong.append("there is no key in it")
    if wrong:
        raise KeysError(path, tuple(wrong))
    return keys


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Number and words of each line that is neither blank nor a comment."""
    for number, line in enumerate(text.split("\n"), start=1):
        if (stripped := line.strip()) and not stripped.startswith("#"):
            yield number, stripped.split()


def _digest(key: str) -> bytes:
    # Any text has a digest of its own, also the lone surrogates that no key has.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
