"""Find and fill in templates: the operator's own first, then the shipped ones. Decides nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from chatterbox_deploy import nginx, systemd
from chatterbox_deploy.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Mapping

_PACKAGE = Path(__file__).parent
_KINDS = ("units", "nginx", "monitoring")
"""Folders of templates; the last one lies in the package, the others at the top of the repository."""


def shipped() -> Path:
    """Directory of ``units/`` and ``nginx/``: inside an installed package, or the checkout of an editable one."""
    inside = _PACKAGE / "_templates"
    return inside if inside.is_dir() else _PACKAGE.parents[1]


def read_own(folder: Path) -> dict[str, str]:
    """An operator's own templates by name.

    Raises:
        TemplateError: there are none, or one cannot be read.
    """
    try:
        found = {
            f"{kind}/{path.name}": path.read_text(encoding="utf-8")
            for kind in _KINDS
            for path in sorted((folder / kind).glob("*.j2"))
        }
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read templates in {folder}: {error}"
        raise TemplateError(msg) from None
    if not any((folder / kind).is_dir() for kind in _KINDS):
        msg = f"cannot use templates in {folder}: it holds neither units/ nor nginx/ nor monitoring/"
        raise TemplateError(msg)
    return found


class Templates:
    """Templates by the name they have below ``units/``, ``nginx/`` and ``monitoring/``."""

    def __init__(self, own: Mapping[str, str] | None = None) -> None:
        """Texts in ``own`` come first; a template that is missing there comes from the package."""
        self.own = dict(own or {})
        self._environment = _environment(tuple(sorted(self.own.items())))

    def fill_in(self, name: str, values: Mapping[str, object]) -> str:
        """Text of template ``name`` with ``values``.

        Raises:
            TemplateError: the template is missing, is not Jinja, or asks for a value that does not exist.
        """
        try:
            text = self._environment.get_template(name).render(values)
            # A lone surrogate could not be written.
            text.encode()
        except jinja2.TemplateNotFound as error:
            msg = f"cannot find template {error.name}"
            raise TemplateError(msg) from None
        except jinja2.TemplateSyntaxError as error:
            msg = f"cannot read template {error.filename or name}, line {error.lineno}: {error.message}"
            raise TemplateError(msg) from None
        except OSError as error:
            msg = f"cannot read template {name}: {error.strerror}"
            raise TemplateError(msg) from None
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            msg = f"cannot fill in template {name}: {error}"
            raise TemplateError(msg) from None
        else:
            return text


# Compiling the templates takes ten times as long as filling them in.
@cache
def _environment(own: tuple[tuple[str, str], ...]) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.DictLoader(dict(own)), jinja2.FileSystemLoader([shipped(), _PACKAGE])]),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701  unit files and nginx configuration are not HTML; quoting is by filter
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        systemd_quote=systemd.quote,
        systemd_command=systemd.quote_command,
        nginx_quote=nginx.quote,
    )
    return environment
