"""The front's file for a laboratory fleet, from the real template and the real renderer."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from chatterbox_deploy import fleet
from chatterbox_deploy import render as renderer
from chatterbox_deploy.config.tables import FleetConfig
from chatterbox_deploy.fleet import Instance
from chatterbox_deploy.templates import Templates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatterbox_deploy.fleet import Upstream


def render(
    ports: Mapping[str, int],
    listen_port: int,
    access_log: Path,
    *,
    api_keys_file: Path | None = None,
    keepalive_connections: int = 8,
    max_upload_mb: int = 20,
    read_timeout_s: int = 30,
    upstreams: Sequence[Upstream] | None = None,
    **more: Any,
) -> str:
    """nginx's file for instances on ``ports`` by name; ``more`` are settings of the front beyond its defaults."""
    front = replace(
        fleet.resolve(FleetConfig(gpus={"0": 6093})).front,
        listen=f"127.0.0.1:{listen_port}",
        access_log=str(access_log),
        max_upload_mb=max_upload_mb,
        read_timeout_s=read_timeout_s,
        keepalive_connections=keepalive_connections,
        api_keys_file=None if api_keys_file is None else str(api_keys_file),
        **more,
    )
    instances = tuple(
        Instance(name=name, gpus=("0",), host="127.0.0.1", port=port, command=("server",), environment={})
        for name, port in ports.items()
    )
    laboratory = SimpleNamespace(front=front, instances=instances)
    return renderer.front(laboratory, Templates(), source="fleet.toml", upstreams=upstreams)  # type: ignore[arg-type]
