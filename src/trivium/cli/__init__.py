"""The command line: one verb per stage, plus run, serve, rank, people, database, dashboard, report, chat, doctor.

The list of verbs is static and everything else is imported when its verb is used, so that `trivium --help` answers at
once. A foreseeable mistake ends in one sentence on standard error and a non-zero exit code, never in a traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from trivium import __version__
from trivium.cli.verbs import TOOLS, help_text
from trivium.config import STAGES, ConfigError, UserError, is_disk_full, suggest

EXTRAS = dict.fromkeys(
    ("fastapi", "uvicorn", "markdown_it", "mdit_py_plugins", "matplotlib", "plotly", "pydantic"), "web"
) | dict.fromkeys(("trafilatura", "pyarrow", "py3langid", "datasets"), "data")
"""Which extra brings a package that a verb may miss."""

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
"""What the system says to a path of the user's that cannot serve."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped; run the same command again to resume", 130)
    except BrokenPipeError:
        # The reader of our output has gone; without this Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if is_disk_full(error):
            what = error.filename or "a file"
            return _fail(f"no space left to write {what}; free some and run the same command again", 5)
        if error.errno not in REFUSED:
            raise
        return _fail(f"cannot use {error.filename}: {error.strerror}; mend that, or name another place", 2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(f"this needs the package {package!r}; pip install 'trivium[{EXTRAS[package]}]'", 2)


def _fail(sentence: str, code: int) -> int:
    # Of several ranks the first speaks for all; one that alone found a mistake has said so before it came here.
    if os.environ.get("RANK", "0") == "0" or not os.environ.get("MASTER_PORT"):
        print(f"trivium: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def _dispatch(words: list[str]) -> int:
    verb, rest = (words[0], words[1:]) if words else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if verb in ("-V", "--version"):
        print(f"trivium {__version__}")
        return 0
    if verb == "run" or verb in STAGES:
        from trivium.cli import recipes

        return recipes.run(verb, rest)
    if verb == "doctor":
        from trivium.cli import doctor

        return doctor.run(rest)
    if verb in ("people", "database"):
        from trivium.cli import judgements

        return judgements.run(verb, rest)
    if verb in TOOLS:
        from trivium.cli import pages

        return pages.VERBS[verb](rest)
    raise ConfigError(f"no verb {verb!r}{suggest(verb, (*TOOLS, *STAGES))}")
