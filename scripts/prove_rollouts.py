"""How many requests does a fleet lose while it changes? Real systemd (in a sandbox), real nginx, espeak, steady load.

    sudo python scripts/prove_rollouts.py > scripts/prove_rollouts.txt
    sudo python scripts/prove_rollouts.py --requests 1000

Every kind of change, again and again, then `kill -9` of `apply` at each step of a plan that swaps two ports and removes
a GPU, each followed by `apply`, until so many requests were made. One line a kind of change; "retried" is what the
front asked a second instance for, by its log.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from host import live
from host.live import APPLY, TWO, LiveFleet, fleet_toml
from support import sandbox


def every_change(fleet: LiveFleet) -> None:
    """Each of them has to be made: one that was gone back on would lose nothing either."""
    made = len(fleet.changes)
    live.every_change(fleet)
    for change in fleet.changes[made:]:
        if change.status != 0:
            sys.exit(f"{change.name}: exit status {change.status}\n{change.said}")


def killed_at_every_step(fleet: LiveFleet) -> None:
    """Until a step number that the plan does not have."""
    three = fleet_toml({**TWO, "2": "6096"})
    step = 0
    while True:
        step += 1
        fleet.write(three)
        fleet.change("before it", APPLY)
        fleet.write(fleet_toml({"0": "6094", "1": "6093"}))
        killed, again = fleet.killed_at(step)
        if again.status != 0 or fleet.plan_status() != 0:
            sys.exit(f"killed at step {step}, it does not converge:\n{again.said}")
        if killed.status != 0:
            print(f"# apply was killed as each of its {step - 1} steps began, and converged each time")
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rate", type=int, default=35, help="requests a second")
    asked = parser.parse_args()
    name = f"prove-rollouts-{os.getpid()}"
    binds = [word for source, place in sandbox.mounts() for word in ("--bind-ro", f"{source}:{place}")]
    subprocess.run([sandbox.COMMAND, "up", name, "--owner", str(os.getpid()), "--ttl", "7200", *binds], check=True)
    try:
        booted = sandbox.Sandbox(name)
        sandbox.install_python(booted)
        fleet = LiveFleet(booted, rate_per_s=asked.rate)
        fleet.install()
        print(f"# {platform.machine()}, {os.cpu_count()} cores; {asked.rate} requests a second")
        while sum(change.requests for change in fleet.changes) < asked.requests / 2:
            every_change(fleet)
        killed_at_every_step(fleet)
        while sum(change.requests for change in fleet.changes) < asked.requests:
            every_change(fleet)
    finally:
        subprocess.run([sandbox.COMMAND, "down", name], check=True)
    report(fleet)


def report(fleet: LiveFleet) -> None:
    kinds: dict[str, list[live.Change]] = defaultdict(list)
    for change in fleet.changes:
        kinds[re.sub(r" at step .*", " at each step", change.name)].append(change)
    row = "{:<34} {:>6} {:>9} {:>6} {:>8} {:>16}".format
    print(row("change", "times", "requests", "lost", "retried", "seconds, longest"))
    for kind, changes in [*kinds.items(), ("all", fleet.changes)]:
        counts = [sum(getattr(each, name) for each in changes) for name in ("requests", "lost", "retried")]
        print(row(kind, len(changes), *counts, f"{max(each.seconds for each in changes):.1f}"))
    for change in fleet.changes:
        if change.lost:
            print(f"# lost: {change.name}: {dict(change.outcomes)}")


if __name__ == "__main__":
    main()
