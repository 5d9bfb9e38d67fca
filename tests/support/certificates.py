"""Certificates for an hour, signed by nobody but themselves."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def self_signed(certificate: Path, key: Path, name: str) -> None:
    """Write a certificate for ``name`` and its key, as PEM."""
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    subject = ("-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}")
    subprocess.run(
        ["openssl", "req", "-x509", *curve, "-days", "1", *subject, "-out", certificate, "-keyout", key],
        check=True,
        capture_output=True,
    )
