"""What to change in fleet.toml, and what that brings by what was measured. Decides; asks nobody, writes no file."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from chatterbox_deploy.config import reading, values
from chatterbox_deploy.errors import FleetFileError
from chatterbox_deploy.report import amend, reckoning
from chatterbox_deploy.report.reckoning import Layout, Share

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from chatterbox_deploy.config.tables import FleetConfig
    from chatterbox_deploy.report.reckoning import Reckoning
    from chatterbox_deploy.report.situation import FleetFile, Program, Situation

FIRST_PORT = 6093
FRONT_PORT = 6095
"""The front's, where no file says another one."""

WORTH_IT = 1.2
"""Gain on a GPU below which more instances there are not proposed: runs of the same load differ by a tenth."""

_SPREADING = ("one-gpu-takes-all", "gpu-idle", "pinned-to-one-gpu", "hard-coded-gpu", "cpu-bound-beside-idle-gpu")
"""Findings that an instance on each GPU resolves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One step from what is to what is proposed."""

    what: str
    resolves: tuple[str, ...]
    """Names of findings."""

    gain: float | None
    """Seconds of sound per second, all GPUs together, over those before this step; ``None`` where nobody measured."""

    reckoned: str
    """What the gain is from, or why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A fleet file to have."""

    path: str | None
    """The file to change; ``None``: there is none yet."""

    text: str
    """The whole file, changed."""

    diff: str
    """Unified, for patch(1); empty where there is no file yet."""

    changes: tuple[Change, ...]
    now: Layout
    then: Layout
    gain: float | None
    """All steps together; ``None`` where nobody measured, or nothing speaks now."""

    by_gpu_now: Mapping[str, float]
    """By index of a GPU: seconds of sound per second by the profile, of which only ratios carry over to other kinds of
    GPU. Empty where nobody measured this server."""

    by_gpu_then: Mapping[str, float]
    now_audio_s_per_s: float | None
    """``None`` where the profile is of another kind of GPU: then only the ratio carries over."""

    then_audio_s_per_s: float | None
    basis: str
    """The profile, in words."""

    caveats: tuple[str, ...]
    typed: tuple[str, ...]
    """What to type next."""


def propose(by: Reckoning, found: Collection[str]) -> Proposal | None:
    """A change of the fleet file, or a first one, for findings of these names; ``None``: nothing better is known."""
    file = by.situation.fleet_file
    return _first(by, found) if file is None else _changed(by, found, file)


def _first(by: Reckoning, found: Collection[str]) -> Proposal | None:
    now = by.speaking_now()
    then = {card.index: Share(1, mps=True) for card in by.situation.cards if by.can_take_one(card)}
    if not then:
        return None
    what = (
        f"one instance of this server on each of {len(then)} GPUs" if len(then) > 1 else "one instance of this server"
    )
    steps = [_step(by, f"{what}, behind one front", [name for name in _SPREADING if name in found], now, then)]
    then = _with_replicas(by, then, steps)
    ports = _free_ports({FRONT_PORT} | by.situation.listening)
    lines = [f"{index} = {_toml([next(ports) for _ in range(share.instances)])}" for index, share in then.items()]
    lines = ["[gpus]                  # GPU → port, as nvidia-smi counts", *lines, "", "[server]"]
    text = "\n".join([*lines, f'model = "{by.profile.model}"', *_own_command(by.situation), ""])
    return _made(by, None, text, steps, now, then)


def _changed(by: Reckoning, found: Collection[str], file: FleetFile) -> Proposal | None:
    now = _in_file(by.situation, file.config)
    mps = file.config.unit.mps
    then, steps = dict(now), list[Change]()
    paired = {_index(by.situation, part) for key in file.config.gpus if "," in key for part in key.split(",")}
    by_uuid = any(key.startswith("GPU-") for key in file.config.gpus)
    keys = {index: key for key in file.config.gpus if (index := _index(by.situation, key)) is not None}
    for card in by.situation.cards:
        if card.index in then or card.index in paired or not by.can_take_one(card):
            continue
        keys[card.index] = card.uuid if by_uuid else card.index
        before = dict(then)
        then[card.index] = Share(1, mps=mps)
        resolved = [name for name in _SPREADING[:3] if name in found]
        steps.append(_step(by, f"an instance on GPU {card.index}, which has none", resolved, before, then))
    then = _with_replicas(by, then, steps)
    edits = _new_ports(by.situation, file.config, then, keys)
    if not mps and any(share.instances > 1 for share in then.values()):
        before = dict(then)
        then = {index: Share(share.instances, mps=True) for index, share in then.items()}
        edits["unit", "mps"] = "true"
        resolved = [name for name in ("no-mps",) if name in found]
        steps.append(_step(by, "instances on one GPU compute at the same time (MPS)", resolved, before, then))
    if "tf32-off" in found and not file.config.server.tf32:
        edits["server", "tf32"] = "true"
        steps.append(
            Change(
                what="matrix products in TF32",
                resolves=("tf32-off",),
                gain=None,
                reckoned="at one request a time it was measured to change little: scripts/gpu/stock_server_sweep.txt",
            )
        )
    text = amend.amend(file.text, edits) if edits else None
    return None if text is None else _made(by, file, text, steps, now, then)


def _in_file(situation: Situation, asked: FleetConfig) -> Layout:
    """What it asks for on each GPU that is there; an instance over two is left as it is."""
    listed = ((_index(situation, key), ports) for key, ports in asked.gpus.items())
    counts = {index: len(ports) if isinstance(ports, list) else 1 for index, ports in listed if index is not None}
    return {index: Share(count, mps=asked.unit.mps) for index, count in counts.items()}


def _index(situation: Situation, key: str) -> str | None:
    return next((card.index for card in situation.cards if key in (card.index, card.uuid)), None)


def _with_replicas(by: Reckoning, layout: Layout, steps: list[Change]) -> Layout:
    """``layout`` with more instances on GPUs that have the room and the cores for them; adds to ``steps``."""
    if by.situation.cores is None or not by.measured:
        return layout
    cores = by.situation.cores / len(by.situation.cards)
    after = dict(layout)
    for card in by.situation.cards:
        share, best = after.get(card.index), by.advise(card).best
        if share is None or best is None or best.replicas <= share.instances:
            continue
        more = Share(best.replicas, mps=share.mps)
        if by.of(more, cores) >= WORTH_IT * by.of(share, cores):
            after[card.index] = more
    if after != layout:
        counts = sorted({after[index].instances for index, share in layout.items() if after[index] != share})
        steps.append(_step(by, f"{' or '.join(map(str, counts))} instances on one GPU", [], layout, after))
    return after


def _new_ports(
    situation: Situation, asked: FleetConfig, then: Layout, keys: Mapping[str, str]
) -> dict[tuple[str, str], str]:
    """Lines of [gpus] that change; ports that are given keep their place."""
    fronts = [listen for listen in (asked.nginx.listen, asked.nginx.http_listen) if listen is not None]
    taken = {port for _, port in asked.ports()} | {values.split_listen(listen)[1] for listen in fronts}
    ports = _free_ports(taken | situation.listening, after=max(port for _, port in asked.ports()))
    edits: dict[tuple[str, str], str] = {}
    for index, share in then.items():
        given = asked.gpus.get(keys[index], [])
        listed = given if isinstance(given, list) else [given]
        if share.instances > len(listed):
            edits["gpus", keys[index]] = _toml([*listed, *(next(ports) for _ in range(share.instances - len(listed)))])
    return edits


def _step(by: Reckoning, what: str, resolves: Sequence[str], before: Layout, after: Layout) -> Change:
    """A change of the layout."""
    if not by.measured:
        gain, reckoned = None, "nobody measured this server; `chatterbox-deploy bench` does"
    elif not before:
        gain, reckoned = None, "nothing speaks now that it could be compared with"
    else:
        gain = by.audio_s_per_s(after) / by.audio_s_per_s(before)
        reckoned = f"instances: {reckoning.in_words(before)} → {reckoning.in_words(after)}"
    return Change(what=what, resolves=tuple(resolves), gain=gain, reckoned=reckoned)


def _made(  # noqa: PLR0917  all that a proposal is made of
    by: Reckoning, file: FleetFile | None, text: str, steps: Sequence[Change], now: Layout, then: Layout
) -> Proposal | None:
    path = None if file is None else file.path
    try:
        reading.load(text, source=path or "fleet.toml")
    except FleetFileError:
        # Two changes may not go together, such as MPS and a device of the operator's own; then there is no such file.
        return None
    absolute = by.measured and by.same_gpus
    return Proposal(
        path=path,
        text=text,
        diff="" if file is None else _diff(file.text, text, file.path),
        changes=tuple(steps),
        now=now,
        then=then,
        gain=by.audio_s_per_s(then) / by.audio_s_per_s(now) if by.measured and now else None,
        by_gpu_now=by.by_gpu(now) if by.measured else {},
        by_gpu_then=by.by_gpu(then) if by.measured else {},
        now_audio_s_per_s=by.audio_s_per_s(now) if absolute else None,
        then_audio_s_per_s=by.audio_s_per_s(then) if absolute else None,
        basis=f"{by.profile.model}, measured on {by.profile.machine}: {by.profile.source}",
        caveats=tuple(_caveats(by, now, then)),
        typed=_typed(path),
    )


def _caveats(by: Reckoning, now: Layout, then: Layout) -> Iterator[str]:
    if not by.measured:
        return
    if not by.same_gpus:
        names = " and ".join(dict.fromkeys(card.name for card in by.situation.cards))
        yield (
            f"measured on {by.profile.machine}, not on {names}: the ratio is for a machine with a core for each "
            "instance; seconds of sound per second differ (`python scripts/gpu/replicas.py --profile FILE` measures "
            "yours, `report --profile FILE` reckons by it)"
        )
    if by.situation.fleet_file is None and now:
        yield "what speaks now is reckoned as so many instances of this server"
    cores, instances = by.situation.cores, sum(share.instances for share in then.values())
    if cores is not None and cores <= instances:
        yield f"CPU cores: {cores}, instances: {instances}, and each keeps a core busy; that is reckoned in"
    if cores is None:
        yield "nothing is known of the machine's cores, so no GPU is given more than one instance"


def _own_command(situation: Situation) -> list[str]:
    """The server that runs now, as ``server.command``, for those who want to keep it."""
    kept = next((each for each in situation.programs.values() if each.kind == "speech" and each.command), None)
    if kept is None:
        return []
    who = kept.unit or f"process {kept.pid}"
    command = json.dumps([_with_port(word, kept) for word in _without_secrets(kept.command)], ensure_ascii=False)
    return [
        f"# Or, without model, the server that runs now ({who}), unchanged, once per GPU;",
        "# {port} stands for its port: a server that takes none cannot run twice.",
        f"# command = {command}",
        *([f"# directory = {json.dumps(kept.directory, ensure_ascii=False)}"] if kept.directory else []),
    ]


_SECRET = re.compile(r"(-[\w-]*(?:key|token|secret|passw)[\w-]*)(=?)(.*)", re.IGNORECASE | re.DOTALL)


def _without_secrets(command: Sequence[str]) -> Iterator[str]:
    """A report is shown to others: what follows ``--api-key`` and the like is left out."""
    hidden = False
    for word in command:
        found = _SECRET.fullmatch(word)
        if hidden and not word.startswith("-"):
            yield "…"
        else:
            yield f"{found[1]}=…" if found and found[2] else word
        hidden = found is not None and not found[2]


def _with_port(word: str, program: Program) -> str:
    word = word.replace("{", "{{").replace("}", "}}")
    found = next(
        (port for port in map(str, program.ports) if word == port or word.endswith((f":{port}", f"={port}"))), ""
    )
    return f"{word.removesuffix(found)}{{port}}" if found else word


def _free_ports(taken: Collection[int], *, after: int = FIRST_PORT - 1) -> Iterator[int]:
    return (port for port in chain(range(after + 1, 65_536), range(FIRST_PORT, after)) if port not in taken)


def _toml(ports: Sequence[int]) -> str:
    return str(ports[0]) if len(ports) == 1 else f"[{', '.join(map(str, ports))}]"


def _diff(before: str, after: str, path: str) -> str:
    lines = difflib.unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), path, path)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _typed(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ("chatterbox-deploy plan fleet.toml", "sudo chatterbox-deploy apply fleet.toml")
    quoted = shlex.quote(path)
    return (
        f"chatterbox-deploy report {quoted} --format json | jq -r .proposal.diff | patch {quoted}",
        f"chatterbox-deploy plan {quoted}",
        f"sudo chatterbox-deploy apply {quoted}",
    )
