"""Instances out of the front, and back into it, without a restart. Prints nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chatterbox_deploy import nginx, render
from chatterbox_deploy.change import apply, blueprint, deploy, ledger
from chatterbox_deploy.change.difference import Change
from chatterbox_deploy.change.steps import ShowFront, WaitIdle
from chatterbox_deploy.errors import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Collection

    from chatterbox_deploy.change.deploy import Author, Progress
    from chatterbox_deploy.change.steps import Step
    from chatterbox_deploy.host import Host


def drain(
    host: Host, names: Collection[str], author: Author, progress: Progress, *, drained: bool, force: bool = False
) -> None:
    """Take instances out of the front and wait until they are idle, or put them back. ``ledger.lock`` is held.

    Raises:
        CommandFailed: nothing was applied here, another change did not end, the front was edited by hand, nginx
            refuses, or (without ``force``) nobody else would be in service.
    """
    wanted = blueprint.want(blueprint.current(host))
    remembered = ledger.read(host)
    begun = remembered.begun
    if begun is not None and begun.drained is None:
        msg = f"cannot begin: a change did not end; {deploy.advice(host)}"
        raise CommandFailed(msg)
    path = render.FRONT_PATH
    before = (host.read_bytes(path) or b"").decode(errors="replace")
    if not render.is_ours(before):
        msg = f"cannot find our front at {path}: `chatterbox-deploy apply` writes it"
        raise CommandFailed(msg)
    if remembered.wrote(path, before) is False:
        msg = f"cannot change {path}, edited by hand: `chatterbox-deploy plan` shows how, `apply` writes it anew"
        raise CommandFailed(msg)
    so_far = set(remembered.drained if begun is None or begun.drained is None else begun.drained)
    out = sorted(so_far | set(names) if drained else so_far - set(names))
    upstreams = [replace(upstream, drained=upstream.name in out) for upstream in nginx.find_upstreams(before)]
    if drained and not force and all(upstream.drained or upstream.leaving for upstream in upstreams):
        msg = f"cannot drain {', '.join(names)}: nobody else is in service, and requests would get 503; --force does it"
        raise CommandFailed(msg)
    service = wanted.fleet.service
    text = wanted.front(upstreams)
    steps: list[Step] = []
    # One that was cut short may have written the front, and nginx not read it.
    if text != before or begun is not None:
        steps.append(ShowFront(Change(render.RenderedFile(path, text), before), tuple(upstreams)))
    if drained:
        steps += [
            WaitIdle(upstream.name, upstream.host, upstream.port, service.stop_timeout_s, service.speaks_notify)
            for upstream in upstreams
            if upstream.name in names
        ]
    deploy.begin(host, author, steps, drained=out)
    try:
        apply.carry_out(steps, host, progress(len(steps)))
    except CommandFailed as error:
        deploy.log(host, author, f"failed: {error}")
        if begun is None and (host.read_bytes(path) or b"").decode(errors="replace") == before:
            # nginx refused it, and has what it had.
            ledger.end(host, remembered)
        raise
    ledger.end(host, replace(remembered, files={**remembered.files, **deploy.front_digest(host)}, drained=out))
    deploy.log(host, author, "done")
