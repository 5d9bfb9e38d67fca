"""``chatterbox-deploy advise``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from chatterbox_deploy.change import observe
from chatterbox_deploy.cli import arguments, mistakes
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.gpu.query import MEBIBYTE, Gpu
from chatterbox_deploy.host import LocalHost
from chatterbox_deploy.sizing import advice, capacity, profile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chatterbox_deploy.sizing.advice import Advice, Row
    from chatterbox_deploy.sizing.profile import Profile

_FIRST_PORT = 6093
_FRONT_PORT = 6095


@click.command("advise", cls=mistakes.Command)
@click.option(
    "--model", type=click.Choice(["chatterbox", "turbo", "multilingual"]), default="chatterbox", show_default=True
)
@arguments.PROFILE
@click.option("--gpu-memory-mib", type=click.IntRange(min=1), help="Of one GPU, instead of asking nvidia-smi.")
@click.option("--cores", type=click.IntRange(min=1), help="Of the machine, instead of counting them.")
@click.option(
    "--utterance-s", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Length of speech."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with what the tables were made from.")
def advise_command(
    *,
    model: str,
    profile_file: Path | None,
    gpu_memory_mib: int | None,
    cores: int | None,
    utterance_s: float,
    as_json: bool,
) -> None:
    """Show how many instances each GPU should have, what that brings, and the lines of fleet.toml.

    \b
        chatterbox-deploy advise
        chatterbox-deploy advise --model turbo --json | jq '.gpus[].best'
        chatterbox-deploy advise --gpu-memory-mib 24576 --cores 8       # a machine you do not have yet

    It reckons from what was measured (docs/replicas.md has the formulas); what nobody measured, it does not
    recommend. Changes nothing.
    """
    host = LocalHost()
    known = profile.built_in()
    chosen = arguments.read_profile(profile_file) or known[model]
    gpus = observe.gpus(host) if gpu_memory_mib is None else (_given(gpu_memory_mib),)
    if not gpus:
        msg = "cannot ask nvidia-smi for GPUs; for a machine you do not have yet, say --gpu-memory-mib and --cores"
        raise CommandFailed(msg)
    cores = cores or len(observe.cpus(host) or ()) or os.cpu_count() or 1
    advices = [
        advice.advise(
            chosen,
            known["chatterbox"],
            memory_bytes=gpu.memory_bytes,
            cores=cores / len(gpus),
            utterance_s=utterance_s,
        )
        for gpu in gpus
    ]
    if as_json:
        click.echo(json.dumps(_as_json(chosen, cores, utterance_s, gpus, advices), indent=2))
        return
    click.echo(f"{chosen.model}, measured on {chosen.machine}: {chosen.source}")
    if not all(gpu.name in chosen.machine for gpu in gpus):
        click.echo("another GPU has another pace: `python scripts/gpu/replicas.py --profile FILE` measures yours")
    for gpu, made in zip(gpus, advices, strict=True):
        click.echo()
        _show(gpu, made, cores=cores / len(gpus), utterance_s=utterance_s)
    click.echo()
    click.echo("\n".join(_toml(gpus, advices)))


def _given(memory_mib: int) -> Gpu:
    return Gpu("0", "", "GPU as given", memory_mib * MEBIBYTE, None)


def _as_json(
    chosen: Profile, cores: int, utterance_s: float, gpus: Sequence[Gpu], advices: Sequence[Advice]
) -> dict[str, object]:
    return {
        "profile": chosen.model_dump(),
        "cores": cores,
        "utterance_s": utterance_s,
        "gpus": [{**asdict(gpu), **asdict(made)} for gpu, made in zip(gpus, advices, strict=True)],
    }


def _show(gpu: Gpu, made: Advice, *, cores: float, utterance_s: float) -> None:
    memory = "memory unknown" if gpu.memory_bytes is None else capacity.gigabytes(gpu.memory_bytes)
    click.echo(f"GPU {gpu.index}: {gpu.name}, {memory}, {cores:g} core{'s' * (cores != 1)} for it")
    holds = "any number" if made.memory_holds is None else str(made.memory_holds)
    click.echo(
        f"its memory holds {holds}, its cores carry {made.cores_carry}, up to {made.measured_up_to} were measured"
    )
    if made.scaled_from is not None:
        click.echo(f"how they share a GPU was measured of {made.scaled_from} only: the rest is scaled from it")
    Console(width=120).print(_table(made, utterance_s))
    if made.pipeline is not None and made.long_text is not None:
        click.echo(
            "T3 and S3Gen at the same time, as a pipeline on this GPU or split over two: at most "
            f"{made.pipeline:.2f} x one instance,\n{made.long_text:.2f} x as fast for a text of {advice.PIECES} pieces "
            "alone, and no faster for one piece; a second GPU with instances of its own is 2.00 x"
        )


def _table(made: Advice, utterance_s: float) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    titles = (
        "instances", "MPS", "audio s/s", "measured", "gain", f"{utterance_s:g} s take", f"wait at {advice.LOAD:.0%}",
        "GPU memory", "cores", "",
    )  # fmt: skip
    for title in titles:
        table.add_column(title, justify="left" if title in ("MPS", "") else "right", no_wrap=True)
    for row in made.rows:
        table.add_row(*_cells(row, made))
    return table


def _cells(row: Row, made: Advice) -> tuple[str, ...]:
    return (
        str(row.replicas),
        "-" if row.replicas == 1 else "yes" if row.mps else "no",
        f"{row.audio_s_per_s:.2f}",
        "-" if row.measured is None else f"{row.measured:.2f}",
        f"{row.gain:.2f} x",
        f"{row.latency_s:.1f} s",
        f"{row.wait_s:.1f} s",
        capacity.gigabytes(row.gpu_memory_bytes),
        f"{row.cores:.1f}",
        "best" if row == made.best else "" if row.fits else "does not fit",
    )


def _toml(gpus: Sequence[Gpu], advices: Sequence[Advice]) -> list[str]:
    """Lines of fleet.toml for what is best on each GPU."""
    if all(made.best is None for made in advices):
        return ["no lines of fleet.toml: not even one instance fits"]
    lines = ["[gpus]"]
    port = _FIRST_PORT
    for gpu, made in zip(gpus, advices, strict=True):
        if made.best is None:
            lines.append(f"# {gpu.index}: not even one instance fits")
            continue
        ports: list[int] = []
        while len(ports) < made.best.replicas:
            ports += [port] if port != _FRONT_PORT else []
            port += 1
        lines.append(f"{gpu.index} = {ports if len(ports) > 1 else ports[0]}")
    if any(made.best is not None and made.best.replicas > 1 and not made.best.mps for made in advices):
        lines += ["", "[unit]", "mps = false"]
    return lines
