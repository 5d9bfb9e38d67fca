"""What is wrong with how a machine's GPUs are used, each with the evidence. Decides; asks nobody."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from chatterbox_deploy.gpu import usage
from chatterbox_deploy.report import pins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chatterbox_deploy.gpu.cards import Card, Process
    from chatterbox_deploy.report.situation import Program, Situation

Severity = Literal["high", "medium", "low"]

STRANGERS_BYTES = 512 * 2**20
"""Memory of others on one GPU from which on it is worth a word."""

CPU_BOUND_CORES = 0.8
"""CPU seconds per second from which on a server computes, and does not merely wait."""

ENOUGH_REQUESTS = 100
"""For each instance. Fewer say little about shares: of so many, chance takes or gives a tenth."""

UNEVEN = 1.5
"""A share over the even one, or the even one over a share, that chance does not explain."""

_THERMAL = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that costs speed, or is about to."""

    name: str
    """``gpu-idle``: the same for every report, for programs."""

    severity: Severity
    """high: a GPU, or most of one, is wasted, or it will fail; medium: it costs much under load; low: worth knowing."""

    what: str
    """One sentence."""

    gpus: tuple[str, ...] = ()
    """Indices."""

    evidence: tuple[str, ...]
    """What was seen, and where."""

    remedy: str
    """What to do; a change of fleet.toml is in the proposal."""


def find(situation: Situation) -> tuple[Finding, ...]:
    """All, the gravest first."""
    order: tuple[Severity, ...] = ("high", "medium", "low")
    found = [finding for rule in RULES for finding in rule(situation)]
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


def _gpu_not_here(situation: Situation) -> Iterator[Finding]:
    file = situation.fleet_file
    # A capture may be of some GPUs only (-i); a slice of one (MIG) has no card of its own.
    if file is None or not file.fleet.service.uses_gpu or situation.captured:
        return
    here = {name for card in situation.cards for name in (card.index, card.uuid)}
    asked = dict.fromkeys(gpu for instance in file.fleet.instances for gpu in instance.gpus)
    missing = tuple(gpu for gpu in asked if gpu not in here and not gpu.startswith("MIG-"))
    if missing:
        known = ", ".join(f"GPU {card.index}: {card.name}" for card in situation.cards) or "none"
        yield Finding(
            name="gpu-not-here",
            severity="high",
            what=f"{file.path} is for {usage.named(missing)}, which this machine has not got",
            evidence=(f"known here: {known} (by {situation.told_by})",),
            remedy="`nvidia-smi -L` lists the GPUs by number and UUID; if one is missing there, dmesg(1) may say why",
        )


def _gpu_idle(situation: Situation) -> Iterator[Finding]:
    idle = [card for card in situation.cards if usage.is_idle(card)]
    others = [card for card in situation.cards if card.uuid and card not in idle]
    for card in idle:
        yield Finding(
            name="gpu-idle",
            severity="high" if others else "low",
            what=f"GPU {card.index} ({card.name}) is idle" + (" while another computes" if others else ""),
            gpus=(card.index,),
            evidence=(usage.in_words(card),),
            remedy=_remedy_for_idle(situation, card),
        )


def _remedy_for_idle(situation: Situation, card: Card) -> str:
    file = situation.fleet_file
    keys = () if file is None else (part for key in file.config.gpus for part in key.split(","))
    if any(key in (card.index, card.uuid) for key in keys):
        return (
            f"the instance that {file.path if file else 'the file'} gives it does not run: `chatterbox-deploy status`"
        )
    if not usage.is_usable(card):
        return "it cannot take an instance as it is set up: MIG (`nvidia-smi -mig 0`), or its compute mode"
    return "give it an instance of its own"


def _one_gpu_takes_all(situation: Situation) -> Iterator[Finding]:
    cards = [card for card in situation.cards if card.uuid]
    at_work = [card for card in cards if not usage.is_idle(card)]
    if len(cards) < 2 or len(at_work) != 1 or not all(usage.is_idle(card) for card in cards if card not in at_work):
        return
    (card,) = at_work
    used = [each.memory_used_bytes for each in cards]
    total = sum(each or 0 for each in used)
    evidence = [usage.in_words(each) for each in cards]
    if None not in used and total:
        share = (card.memory_used_bytes or 0) / total
        here = usage.mebibytes(card.memory_used_bytes or 0)
        evidence.insert(0, f"{here} of the {usage.mebibytes(total)} in use are on it ({100 * share:.1f} %)")
    yield Finding(
        name="one-gpu-takes-all",
        severity="high",
        what=f"GPU {card.index} does all the work of {len(cards)}",
        gpus=(card.index,),
        evidence=tuple(evidence),
        remedy="one instance per GPU, and a front that sends each request to the one with the least to do",
    )


def _pinned_to_one(situation: Situation) -> Iterator[Finding]:
    targets = [pins.pinned_to(pin.visible, situation.cards) for pin in situation.pins]
    free = [each for each in _speaking(situation) if each.environment_read and each.visible is None]
    if len(situation.cards) < 2 or not targets or free or len(set(targets)) != 1 or targets[0] is None:
        return
    who = "the only server" if len(targets) == 1 else f"all {len(targets)} servers"
    yield Finding(
        name="pinned-to-one-gpu",
        severity="high",
        what=f"CUDA_VISIBLE_DEVICES pins {who} to GPU {targets[0]}, of {len(situation.cards)}",
        gpus=(targets[0],),
        evidence=tuple(f"{pin.who}: CUDA_VISIBLE_DEVICES={pin.visible}" for pin in situation.pins),
        remedy="a unit for each GPU, each with a number of its own",
    )


def _hard_coded(situation: Situation) -> Iterator[Finding]:
    for path in dict.fromkeys(line.path for line in situation.code):
        lines = [line for line in situation.code if line.path == path]
        # Within a unit that sees one GPU there is only cuda:0: any other number fails, and a number that is reckoned
        # from CUDA_VISIBLE_DEVICES does on every GPU but the first.
        fails = [line for line in lines if line.device != "cuda:0"]
        yield Finding(
            name="hard-coded-gpu",
            severity="high" if fails else "medium",
            what=f"{PurePosixPath(path).name} names {lines[0].device if len(lines) == 1 else 'GPUs'} in its code: "
            + (
                "with one GPU visible, as in a unit of its own, that one does not exist or is another"
                if fails
                else "without CUDA_VISIBLE_DEVICES every copy of it ends up on the first GPU"
            ),
            evidence=tuple(f"{line.path}:{line.number}: {line.text[:100]}" for line in lines),
            remedy='write "cuda", and let CUDA_VISIBLE_DEVICES choose: each unit of ours sees its own GPU alone',
        )


def _cpu_bound(situation: Situation) -> Iterator[Finding]:
    idle = [card.index for card in situation.cards if usage.is_idle(card)]
    on_gpus = {process.pid for card in situation.cards for process in card.processes or ()}
    hungry = [
        each
        for each in _speaking(situation)
        if each.pid not in on_gpus and each.cpu_cores is not None and each.cpu_cores >= CPU_BOUND_CORES
    ]
    meant = situation.fleet_file is not None and not situation.fleet_file.fleet.service.uses_gpu
    if not idle or not hungry or meant:
        return
    yield Finding(
        name="cpu-bound-beside-idle-gpu",
        severity="high",
        what=f"{_who(hungry[0])} computes on the CPU{f', and {len(hungry) - 1} more do' if len(hungry) > 1 else ''}, "
        f"while {usage.named(idle)} {'is' if len(idle) == 1 else 'are'} idle",
        gpus=tuple(idle),
        evidence=tuple(f"{_who(each)}: {each.cpu_cores:.1f} cores, no GPU memory" for each in hungry),
        remedy='is torch a CPU build (`python -c "import torch; print(torch.version.cuda)"`), or its device "cpu"?',
    )


def _unbalanced(situation: Situation) -> Iterator[Finding]:
    traffic = situation.traffic
    if traffic is None or len(situation.in_service) < 2:
        return
    # Who left the fleet meanwhile is not among those who could have shared.
    answered = {name: traffic.answered.get(name, 0) for name in situation.in_service}
    total = sum(answered.values())
    if total < ENOUGH_REQUESTS * len(answered):
        return
    even = total / len(answered)
    if max(answered.values()) < UNEVEN * even and min(answered.values()) * UNEVEN > even:
        return
    yield Finding(
        name="unbalanced-upstream",
        severity="medium",
        what=f"the front's requests are not shared evenly: {max(answered, key=lambda name: answered[name])} answered "
        f"{100 * max(answered.values()) / total:.0f} % of them, and {100 / len(answered):.0f} % would be even",
        evidence=(
            *(f"{name}: {count:,} of {total:,} ({100 * count / total:.0f} %)" for name, count in answered.items()),
            f"access log from {traffic.first} to {traffic.last}",
        ),
        remedy="`chatterbox-deploy status` shows who was away; a GPU that is slower gets fewer, and rightly so",
    )


def _no_zone(situation: Situation) -> Iterator[Finding]:
    fleet = situation.fleet_file
    ports = {instance.port for instance in fleet.fleet.instances} if fleet is not None else set()
    ports |= {port for each in _speaking(situation) for port in each.ports}
    for block in situation.upstreams:
        if block.least_conn and not block.zone and ports.intersection(block.ports):
            yield Finding(
                name="least-conn-without-zone",
                severity="medium",
                what=f"upstream {block.name} has least_conn without zone: each nginx worker counts for itself",
                evidence=(
                    f"{block.path}: upstream {block.name}, ports {', '.join(map(str, block.ports))}",
                    "a worker knows only of the requests that it handed on itself, and may send one to the busiest",
                ),
                remedy=f"add `zone {block.name} 1m;` to it; the front that we render has one",
            )


def _throttling(situation: Situation) -> Iterator[Finding]:
    for card in situation.cards:
        if not card.throttled_by:
            continue
        hot = [reason for reason in card.throttled_by if reason in _THERMAL]
        parts = (
            f"GPU {card.index}: {', '.join(card.throttled_by)}",
            None if card.temperature_c is None else f"{card.temperature_c:.0f} °C",
            None
            if card.power_w is None or card.power_limit_w is None
            else f"{card.power_w:.0f} of {card.power_limit_w:.0f} W",
            None
            if card.sm_clock_mhz is None or card.sm_clock_max_mhz is None
            else f"{card.sm_clock_mhz:,} of {card.sm_clock_max_mhz:,} MHz",
        )
        yield Finding(
            name="throttling",
            severity="high" if hot else "low",
            what=f"GPU {card.index} is slowed down: {', '.join(card.throttled_by)}",
            gpus=(card.index,),
            evidence=(", ".join(part for part in parts if part),),
            remedy="look after its cooling and its power supply"
            if hot
            else "its power limit is reached (`nvidia-smi -q -d POWER`): as it should be under full load",
        )


def _strangers(situation: Situation) -> Iterator[Finding]:
    for card in situation.cards:
        others = [
            process
            for process in card.processes or ()
            if situation.program(process.pid).kind in ("other", "display") and process.memory_bytes
        ]
        held = sum(process.memory_bytes or 0 for process in others)
        if held < STRANGERS_BYTES:
            continue
        yield Finding(
            name="memory-held-by-strangers",
            severity="medium",
            what=f"{usage.mebibytes(held)} of GPU {card.index} are held by programs that do not speak",
            gpus=(card.index,),
            evidence=tuple(
                f"{_who(situation.program(process.pid))}: {usage.mebibytes(process.memory_bytes or 0)}"
                for process in others
            ),
            remedy="end them, move them to another GPU, or count with what they leave",
        )


def _no_mps(situation: Situation) -> Iterator[Finding]:
    for card in situation.cards:
        sharing = _sharing(situation, card)
        clients = [each for each in card.processes or () if "M" in (each.kind or "") or usage.is_mps_server(each)]
        if len(sharing) < 2 or clients:
            continue
        yield Finding(
            name="no-mps",
            severity="medium",
            what=f"{len(sharing)} servers share GPU {card.index} without MPS: they take turns",
            gpus=(card.index,),
            evidence=tuple(
                f"{_who(situation.program(each.pid))}: type {each.kind or '-'}, which is no client of MPS (M+C)"
                for each in sharing
            ),
            remedy="unit.mps is on, yet they have no daemon: `chatterbox-deploy status`"
            if situation.fleet_file is not None and situation.fleet_file.config.unit.mps
            else "unit.mps = true, which is the default of a fleet file",
        )


def _sharing(situation: Situation, card: Card) -> list[Process]:
    """Servers on it. In a capture, which has no command lines, those of one name are taken for copies of one server."""
    there = usage.computing(card)
    if not situation.captured:
        return [each for each in there if situation.program(each.pid).kind in ("instance", "speech")]
    names = Counter(each.name for each in there if situation.program(each.pid).kind in ("instance", "speech", None))
    name, count = names.most_common(1)[0] if names else (None, 0)
    return [each for each in there if each.name == name] if count > 1 else []


def _tf32_off(situation: Situation) -> Iterator[Finding]:
    off = [name for name, on in situation.tf32.items() if not on]
    if off:
        yield Finding(
            name="tf32-off",
            severity="low",
            what=f"{usage.listed(off)} {'multiplies' if len(off) == 1 else 'multiply'} matrices without TF32",
            evidence=tuple(f"{name}: /readyz says tf32.matmul false" for name in off),
            remedy="server.tf32 = true; of the stock engine at one request a time it was measured to change little "
            "(scripts/gpu/stock_server_sweep.txt)",
        )


RULES: tuple[Callable[[Situation], Iterator[Finding]], ...] = (
    _one_gpu_takes_all,
    _gpu_not_here,
    _gpu_idle,
    _pinned_to_one,
    _hard_coded,
    _cpu_bound,
    _unbalanced,
    _no_zone,
    _throttling,
    _strangers,
    _no_mps,
    _tf32_off,
)


def _speaking(situation: Situation) -> Sequence[Program]:
    return [each for each in situation.programs.values() if each.kind in ("instance", "speech")]


def _who(program: Program) -> str:
    """``chatterbox.service (python, process 812)``."""
    name = program.name or "a process"
    return f"{program.unit} ({name}, process {program.pid})" if program.unit else f"{name} (process {program.pid})"
