"""The `toast-onnx` command: imports only the subcommand that was asked for, and turns failures into exit statuses."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import importlib
import logging
import os
import signal
import sys
import threading
from typing import Any

import click

from toast_onnx import __version__
from toast_onnx.errors import ConfigError, ToastError
from toast_onnx.files import check_text, remember_files
from toast_onnx_cli.commands import QUIET
from toast_onnx_cli.words import WORDS

# Name -> line in --help. `toast_onnx_cli/<name>.py` (a dash becomes an underscore) holds it as `command`; the help
# stands here so that listing the commands imports none of them, and ONNX Runtime with them.
SUBCOMMANDS: dict[str, str] = {
    "inspect": "Show a model's blocks: widths, MACs, what can be pruned and why not.",
    "calibrate": "Measure a model's activations on images, for pruning.",
    "statistics": "Add up what `calibrate` measured on several machines, or on other samples.",
    "analyze": "Show how redundant the feed-forward networks are: dead channels, R2, effective rank.",
    "sensitivity": "Prune one part of one block at a time and measure what breaks.",
    "plan": "Find the ratios that fit a budget and hurt the output least.",
    "costs": "Time a model at every width, for plans with a latency budget.",
    "prune": "Remove dimensions and channels from a model, as a ratios file says.",
    "sweep": "Prune a model to several sizes, measured once, and show what each costs.",
    "quantize": "Put a model's linear layers into 8 bits, and show what that costs.",
    "compare": "Hold a pruned model against its dense original: agreement, drift, cost, latency.",
    "finetune": "Train a pruned model to imitate the dense one; same graph, better weights.",
    "eval": "Measure a model's accuracy on labelled images.",
    "build": "Build a TensorRT engine from a model.",
    "bench": "Time models in ONNX Runtime, or engines with trtexec.",
    "check-engine": "Compare an engine's outputs with those of the model it was built from.",
    "deploy": "Prune, convert, build, measure and check in one go, from one file.",
    "report": "Make one HTML page of a pruned model and what was measured on it.",
    "presets": "List the paper's published schedules, or print one as a ratios file.",
}

LOGGERS = ("toast_onnx", "toast_onnx_calibration", "toast_onnx_cli")

# What a shell reports for a process that SIGINT (2), SIGPIPE (13) or SIGTERM (15) ended: 128 + the signal's number.
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143

#: Least address space, in bytes: libraries and their threads map some 300 MiB on a machine of few cores.
ADDRESS_SPACE = 1 << 30

#: Freed memory up to this many bytes stays with the process; larger arrays come from the system one by one. Older
#: versions of glibc take no more than the second.
KEPT_MEMORY = (1 << 30, 1 << 25)
#: Options of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

logger = logging.getLogger(__name__)


class LazyGroup(click.Group):
    """A group that imports a subcommand's module when it runs, and maps expected failures to exit statuses."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keeps the words as they were given, for reports that say how a run is repeated."""
        ctx.meta[WORDS] = tuple(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of `SUBCOMMANDS`, which is the order of a user's work."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand of that name, imported now, or None where there is none."""
        if cmd_name not in SUBCOMMANDS:
            return None
        module = importlib.import_module(f"toast_onnx_cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The subcommand that the arguments begin with.

        Raises:
            click.UsageError: there is none of that name; says which was meant.
        """
        name = args[0]
        if name in SUBCOMMANDS or name.startswith("-"):
            return super().resolve_command(ctx, args)
        if os.path.exists(name):
            raise click.UsageError(f"'{name}' is a file, not a command: toast-onnx inspect {name}", ctx)
        near = difflib.get_close_matches(name, SUBCOMMANDS, 1, 0.5)
        meant = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(SUBCOMMANDS)}"
        raise click.UsageError(f"no such command '{name}'; {meant}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the subcommands from `SUBCOMMANDS` alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(SUBCOMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the subcommand: a `ToastError` ends in one `Error:` line and status 1, Ctrl-C in one line and 130."""
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # it was closed by whoever started this
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open to the end
        remember_files()
        try:
            check_address_space()
            keep_freed_memory()
            for word in sys.argv[1:]:
                check_text(word, ConfigError)
            result = super().invoke(ctx)
            sys.stdout.flush()  # so that a broken pipe shows here and not while Python shuts down
            return result
        except ToastError as error:
            logger.debug("the error came from here", exc_info=True)
            raise click.ClickException(" ".join(str(error).split())) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader (`| head`) has all it wants.
            _discard_output()
            ctx.exit(EXIT_BROKEN_PIPE)
        except OSError as error:
            logger.debug("the error came from here", exc_info=True)
            if error.filename is None:
                _discard_output()  # a full disk behind stdout, most likely
            where = f"{error.filename!s:.200}: " if error.filename is not None else "the output cannot be written: "
            raise click.ClickException(f"{where}{error.strerror or error}") from error
        except MemoryError as error:
            logger.debug("the error came from here", exc_info=True)
            raise click.ClickException("memory ran out; free some, or raise the limit that is set") from error


def check_address_space() -> None:
    """Make sure that the libraries fit into the address space: without room they crash or wait for ever.

    Raises:
        ConfigError: a limit (`ulimit -v`) is below `ADDRESS_SPACE`.
    """
    if sys.platform == "win32":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE:
        raise ConfigError(
            f"the address space is limited to {limit >> 20} MiB and {ADDRESS_SPACE >> 20} MiB are the least: raise "
            "ulimit -v, or limit the memory of a container instead"
        )


def keep_freed_memory() -> None:
    """Let the C library hand the memory of freed arrays on: pages fresh from the system are cleared for every array.

    Where the library is not glibc, nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        # The second option alone would freeze the first at its least value, so it is set only where that one was taken.
        if any(set_option(_MMAP_THRESHOLD, size) for size in KEPT_MEMORY):
            set_option(_TRIM_THRESHOLD, KEPT_MEMORY[0])


def _discard_output() -> None:
    """Python flushes stdout once more at exit; let that go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "TOAST"})
@click.version_option(__version__, prog_name="toast-onnx")
@click.option("-v", "--verbose", count=True, help="Log what is done; twice for every detail.")
@click.option("-q", "--quiet", is_flag=True, help="Neither progress nor notes; errors and results alone.")
@click.pass_context
def main(context: click.Context, verbose: int, quiet: bool) -> None:
    """Make exported Vision Transformers smaller: an ONNX graph in, a smaller ONNX graph out."""
    configure_logging(verbose)
    context.meta[QUIET] = quiet
    if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(*_: object) -> None:
    """Leave as after an error, so that working files are removed."""
    sys.exit(EXIT_TERMINATED)


def configure_logging(verbose: int) -> None:
    """Sends this project's log to stderr: warnings at 0, progress at 1, every detail at 2 or more."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(level)


if __name__ == "__main__":
    main()
