"""Which instances have grown too old or too large. Asks systemd; restarts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_deploy import systemd

if TYPE_CHECKING:
    from chatterbox_deploy.fleet import Fleet
    from chatterbox_deploy.host import Host

TIMEOUT_S = 30.0
_PROPERTIES = ("Id", "ActiveState", "ActiveEnterTimestampMonotonic", "MemoryCurrent")


def due(host: Host, fleet: Fleet) -> dict[str, str]:
    """Names of running instances past a limit, each with the reason; empty where there is no limit."""
    service = fleet.service
    if not service.recycles:
        return {}
    units = [systemd.unit_name(instance.name) for instance in fleet.instances]
    shown = systemd.parse_show(host.run(systemd.show_argv(units, _PROPERTIES), timeout_s=TIMEOUT_S).stdout)
    found: dict[str, str] = {}
    for instance, unit in zip(fleet.instances, shown, strict=True):
        if unit["ActiveState"] != "active":
            continue
        age_h = (host.monotonic_s() - int(unit["ActiveEnterTimestampMonotonic"]) / 1e6) / 3600
        memory_mb = int(unit["MemoryCurrent"]) / 1e6 if unit.get("MemoryCurrent", "").isdigit() else None
        if service.recycle_after_h is not None and age_h >= service.recycle_after_h:
            found[instance.name] = f"it has run for {age_h:.1f} h; {service.recycle_after_h} h are the limit"
        elif service.recycle_memory_mb is not None and memory_mb is not None and memory_mb >= service.recycle_memory_mb:
            found[instance.name] = f"it holds {memory_mb:.0f} MB; {service.recycle_memory_mb} MB are the limit"
    return found
