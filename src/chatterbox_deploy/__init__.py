"""One TOML file of GPU → port, rendered to systemd units and an nginx front."""

__version__ = "0.1.0"
