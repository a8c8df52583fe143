"""Searches for whoever started it: a script that reads `[pattern, text]` a line and answers 1 or 0.

The kernel's timer of processor time ends it in the middle of a search that takes too long, which no Python code could.
It ends by itself when nobody can ask any more.
"""

from __future__ import annotations

import json
import re
import signal
import sys


def main(seconds: float) -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is for the program that asks
    for line in sys.stdin:
        pattern, text = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        found = re.search(pattern, text) is not None
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write("1\n" if found else "0\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
