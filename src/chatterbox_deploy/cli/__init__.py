"""The command line: parse, call, print. The only place that prints or exits."""

from __future__ import annotations

import traceback
from typing import Any

import click

from chatterbox_deploy import __version__
from chatterbox_deploy.cli import mistakes, telling
from chatterbox_deploy.cli.advise import advise_command
from chatterbox_deploy.cli.bench import bench_command
from chatterbox_deploy.cli.drain import drain_command, undrain_command
from chatterbox_deploy.cli.logs import logs_command
from chatterbox_deploy.cli.monitor import monitor_command
from chatterbox_deploy.cli.plan import apply_command, plan_command
from chatterbox_deploy.cli.recycle import recycle_command
from chatterbox_deploy.cli.render import render_command
from chatterbox_deploy.cli.report import report_command
from chatterbox_deploy.cli.rollback import history_command, rollback_command
from chatterbox_deploy.cli.rollout import rollout_command
from chatterbox_deploy.cli.schema import schema_command
from chatterbox_deploy.cli.service import restart_command, start_command, stop_command
from chatterbox_deploy.cli.speak import speak_command
from chatterbox_deploy.cli.status import status_command
from chatterbox_deploy.cli.uninstall import uninstall_command
from chatterbox_deploy.cli.up import up_command
from chatterbox_deploy.errors import DeployError


class _Shell(click.Group):
    """Shows what the operator can act on bare; anything else is our bug and keeps its traceback."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except click.ClickException as error:
            if isinstance(error, _HELP):
                raise
            _tell(mistakes.text(error))
            raise click.exceptions.Exit(error.exit_code) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DeployError as error:
            _tell(str(error))
            ctx.exit(error.exit_code)
        except click.ClickException as error:
            _tell(mistakes.text(error))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(telling.INTERRUPTED)
        except BrokenPipeError:
            telling.close_output()
            ctx.exit(telling.CLOSED)
        except OSError as error:
            _tell(f"cannot go on: {(error.strerror or str(error)).lower()}")
            ctx.exit(DeployError.exit_code)
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception:  # noqa: BLE001  status 1 would say "out of date" to whoever scripts us
            traceback.print_exc()
            ctx.exit(DeployError.exit_code)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click passes it
        """In the order in which an operator needs them."""
        return list(self.commands)


_HELP = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""What newer versions of click raise where nothing is typed: no mistake."""


def _tell(problem: str) -> None:
    click.echo(f"error: {problem}", err=True)


@click.group(cls=_Shell, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="chatterbox-deploy")
def main() -> None:
    """Run a fleet of Chatterbox text-to-speech servers: one TOML file of GPU → port.

    \b
        chatterbox-deploy plan                       # what fleet.toml would change on this machine, and why
        sudo chatterbox-deploy apply                 # systemd units and an nginx front, without a lost request
        curl --json '{"input": "Hello.", "response_format": "wav"}' \\
             http://127.0.0.1:6095/v1/audio/speech -o hello.wav

    Exit status: 0 done; 1 out of date; 2 the file or the command line is wrong; 3 it could not be done;
    130 interrupted.
    """


main.add_command(render_command)
main.add_command(plan_command)
main.add_command(apply_command)
main.add_command(rollout_command)
main.add_command(rollback_command)
main.add_command(history_command)
main.add_command(drain_command)
main.add_command(undrain_command)
main.add_command(recycle_command)
main.add_command(uninstall_command)
main.add_command(up_command)
main.add_command(status_command)
main.add_command(monitor_command)
main.add_command(report_command)
main.add_command(logs_command)
main.add_command(start_command)
main.add_command(stop_command)
main.add_command(restart_command)
main.add_command(speak_command)
main.add_command(bench_command)
main.add_command(advise_command)
main.add_command(schema_command)
