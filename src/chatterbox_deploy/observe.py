"""Ask a host what is there. Decides nothing."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from chatterbox_deploy import render

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import PurePosixPath

    from chatterbox_deploy.host import Host
    from chatterbox_deploy.render import RenderedFile


def files(host: Host, wanted: Iterable[RenderedFile]) -> dict[PurePosixPath, str]:
    """Text of every file that is wanted, or that has a name we give to files; whoever wrote it."""
    paths = chain(
        (file.path for file in wanted),
        host.glob(render.UNIT_DIR, "chatterbox-tts*.service"),
        host.glob(render.UNIT_DIR, "chatterbox-tts*.target"),
        host.glob(render.FRONT_PATH.parent, "chatterbox-tts*.conf"),
    )
    contents = {path: host.read_bytes(path) for path in paths}
    # Whoever wrote bytes that are no text, it was not us.
    return {path: content.decode(errors="replace") for path, content in contents.items() if content is not None}
