"""The command line as a whole: its groups, and how errors leave it."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO, cast

import typer

from byokeep.cli import status
from byokeep.cli.admin import commands as admin
from byokeep.cli.admin import rotation, tenants, vaultlog
from byokeep.cli.audit import commands as audit
from byokeep.cli.base import interrupt
from byokeep.cli.base.errors import CLOCK_HINT, CliError, Exit, from_rpc
from byokeep.cli.base.output import color_system, print_error
from byokeep.cli.base.session import RUN, ReaderGone, Run, examples, group
from byokeep.cli.base.usage import from_usage
from byokeep.cli.keys import choice as keychoice
from byokeep.cli.keys import commands as keys
from byokeep.cli.keys.refusal import refuse_keys
from byokeep.cli.reviews import commands as reviews
from byokeep.cli.settings import limits, models, policies

_EXITS = (
    "Exit codes: 0 done; 1 --fail-on matched; 2 input; 3 permission; 4 the key needs action;"
    " 5 unavailable; 6 integrity; 7 the review failed; 8 --fail-on-unread matched;"
    " 130 interrupted."
)

app = typer.Typer(
    name="byokeep",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXITS,
)
keys.app.add_typer(keychoice.app)
app.add_typer(keys.app, name="key")
app.add_typer(reviews.app, name="review")
app.add_typer(models.app, name="model")
app.add_typer(limits.app, name="limit")
app.add_typer(policies.app, name="policy")
app.add_typer(tenants.app, name="tenant")
app.add_typer(tenants.callers, name="caller")
app.add_typer(audit.app, name="audit")
admin.app.add_typer(rotation.app)
admin.app.add_typer(vaultlog.app)
app.add_typer(admin.app, name="admin")
app.command("status", epilog=examples("byokeep status"))(status.status)
app.command("doctor", epilog=examples("byokeep doctor --profile demo"))(status.doctor)


def _version(value: bool) -> None:
    if value:
        from importlib import metadata

        print(f"byokeep {metadata.version('byokeep')}")
        raise typer.Exit


@app.callback()
@group
def byokeep(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Keep your own AI provider keys, and review diffs on them.

    A key is sealed here, before it leaves this machine; only keyvault and one short-lived
    process for each attempt open it, and `byokeep key trail` shows every time that they did.
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Prints errors; raises none."""
    # gRPC's own log lines say less than our errors, on the same stream.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    state = Run()
    RUN.set(state)
    try:
        error = _run(arguments)
        if not isinstance(error, CliError):
            error = _flushed(error)
        if isinstance(error, CliError):
            print_error(error, as_json=_wants_json(arguments, state), verbose=state.options.verbose)
            return int(error.exit_code)
        return error
    except (BrokenPipeError, ReaderGone):
        _drop_output()
        return int(Exit.READER_GONE)
    finally:
        if state.session is not None:
            state.session.close()


def _flushed(code: int) -> int | CliError:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        return _explain(error)
    return code


def _drop_output() -> None:
    # What is still buffered is not to be tried again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str]) -> int | CliError:
    # Before anything is done whose outcome nobody would see; Python has None for a closed one.
    if cast(TextIO | None, sys.stdout) is None:
        return CliError("standard output is closed", ">/dev/null, where the answer is not wanted")
    command = typer.main.get_command(app)
    try:
        refuse_keys(arguments)
        if color_system() is None:
            from typer import rich_utils

            rich_utils.COLOR_SYSTEM = None
        result: Any = command.main(args=list(arguments), prog_name="byokeep", standalone_mode=False)
        return result if isinstance(result, int) else Exit.OK
    except CliError as error:
        return error
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except typer.TyperException as error:
        # The help was printed in its stead.
        if type(error).__name__ == "NoArgsIsHelpError":
            return Exit.INPUT
        return from_usage(error, command, arguments)
    except ReaderGone:
        raise
    except SystemExit as ended:
        # rich, which prints the help, ends the process where its reader is gone.
        raise ReaderGone from ended
    except Exception as error:
        if interrupt.seen():
            return Exit.INTERRUPTED
        if os.environ.get("BYOKEEP_DEBUG"):
            raise
        return _explain(error)


def _explain(error: Exception) -> CliError:
    from byokeep.auditlog import VerificationError
    from byokeep.keyshape import KeyFormatError
    from byokeep.profile import ProfileError
    from byokeep.sealing import ClockError, UntrustedIntakeKeyError

    if isinstance(error, typer.Abort):
        print(file=sys.stderr)
        return CliError("nothing was done", exit_code=Exit.INTERRUPTED, reason="CANCELLED")
    if isinstance(error, ProfileError):
        return CliError(str(error), error.hint, reason="CONFIGURATION")
    if isinstance(error, KeyFormatError):
        return CliError(str(error), _key_hint(error.rule), reason=error.reason)
    if isinstance(error, ClockError):
        return CliError(str(error), f"nothing was sealed: {CLOCK_HINT}", reason="CLOCK")
    if isinstance(error, UntrustedIntakeKeyError):
        return from_untrusted(error)
    if isinstance(error, VerificationError):
        return CliError(str(error), exit_code=Exit.INTEGRITY, reason="AUDIT_BROKEN")
    if "grpc" in sys.modules:
        import grpc

        if isinstance(error, grpc.RpcError):
            session = RUN.get().session
            return from_rpc(error, session.profile if session else None)
    if isinstance(error, OSError):
        return CliError(f"{error.filename or 'input or output'}: {error.strerror}")
    return CliError(
        f"something unforeseen in the command itself ({type(error).__name__})",
        "BYOKEEP_DEBUG=1 shows where",
        Exit.UNAVAILABLE,
        reason="INTERNAL",
    )


def _key_hint(rule: str) -> str:
    """Return what to do about a text that is no key of the provider, by the rule that it broke."""
    from byokeep.names import PROVIDERS

    hint = "nothing was sealed or sent"
    issuer = rule.removeprefix("issuer:")
    if issuer in PROVIDERS:
        return f"{hint}; if it is one: byokeep key add {issuer}"
    return f"{hint}; --from-env NAME reads a variable" if rule == "variable" else hint


def from_untrusted(error: Exception) -> CliError:
    """Return the refusal to seal as an error to show."""
    from byokeep.cli.base.errors import HINTS

    return CliError(str(error), HINTS["INTAKE_UNTRUSTED"], Exit.INTEGRITY, "INTAKE_UNTRUSTED")


def _wants_json(arguments: Sequence[str], state: Run) -> bool:
    # Also where parsing broke off before it came to the option.
    pairs = itertools.pairwise([*arguments, ""])
    return (
        state.options.json
        or state.options.format == "json"
        or any(
            one in ("--json", "--format=json") or (one, two) == ("--format", "json")
            for one, two in pairs
        )
    )
