"""Many people rank at once while the server is killed: `bootstrap.py bench rank_load`.

`--annotators` people rank `--tasks` tasks each, as fast as the server answers: fetch a task, post a ranking, the same
again where no answer came. Meanwhile the server is killed with SIGKILL `--kills` times and started again. Afterwards
every acknowledged ranking must be in the database, each once, and nothing else. Prints how long fetching and posting
took; a request that was cut off by a kill counts from its last start.

    python3 bootstrap.py bench rank_load                                              # SQLite in a file
    python3 bootstrap.py bench rank_load --database postgresql://user@host/name       # an empty database there
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from trivium.preferences.store import Store
from trivium.records import Completion, Conversation, Message, atomic_write

RESULTS = Path(__file__).parent / "results" / "rank_load.json"
SERVE = """
import sys
from pathlib import Path
from trivium.apps.rank import serve
serve(Path("."), port=int(sys.argv[2]), database=sys.argv[1])
"""


@dataclass
class Server:
    """The ranking page in a process of its own, to be killed and started again at the same address."""

    database: str
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process; whoever is early is refused and tries again."""
        words = [sys.executable, "-c", SERVE, self.database, str(self.port)]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        """Kill it as a power cut would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@dataclass
class Log:
    """What the annotators saw."""

    fetch_s: list[float] = field(default_factory=list)
    post_s: list[float] = field(default_factory=list)
    acknowledged: list[tuple[str, str]] = field(default_factory=list)
    retries: int = 0
    refused: list[str] = field(default_factory=list)


async def annotate(url: str, name: str, log: Log, seed: int) -> None:
    """Rank until nothing is left, asking again whenever the server is away."""
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, headers={"origin": url}, timeout=30.0) as client:

        async def call(method: str, path: str, times: list[float], **words: Any) -> httpx.Response:
            while True:
                began = time.perf_counter()
                try:
                    if "x-csrf-token" not in client.headers:
                        client.headers["x-csrf-token"] = (await client.get("/api/session")).json()["token"]
                    answer = await client.request(method, path, **words)
                except httpx.TransportError:
                    log.retries += 1
                    client.headers.pop("x-csrf-token", None)
                    await asyncio.sleep(0.05 + 0.1 * rng.random())
                    continue
                if answer.status_code == 403:  # a new process has a new secret; the page, too, fetches a new token
                    client.headers.pop("x-csrf-token", None)
                    log.retries += 1
                    continue
                times.append(time.perf_counter() - began)
                return answer

        while True:
            task = (await call("GET", "/api/task", log.fetch_s, params={"annotator": name})).json()["task"]
            if task is None:
                return
            order = list(range(len(task["responses"])))
            rng.shuffle(order)
            body = {"task": task["id"], "annotator": name, "groups": [[place] for place in order]}
            answer = await call("POST", "/api/rank", log.post_s, json=body | {"key": rng.randbytes(16).hex()})
            if answer.status_code == 200:
                log.acknowledged.append((name, task["id"]))
            else:
                log.refused.append(answer.text)


async def storm(server: Server, options: argparse.Namespace, log: Log) -> None:
    """Let everybody rank, and kill the server now and then."""
    people = [
        asyncio.create_task(annotate(server.url, f"person {n}", log, options.seed + n))
        for n in range(options.annotators)
    ]
    everything = options.annotators * options.tasks
    for number in range(options.kills):
        share = everything * (number + 1) // (options.kills + 1)
        while len(log.acknowledged) < share and not all(person.done() for person in people):
            await asyncio.sleep(0.02)
        server.kill()
        server.start()
    await asyncio.gather(*people)


def fill(database: str, options: argparse.Namespace) -> None:
    """Store the tasks, each wanted from everybody."""
    with Store(database) as store:
        items = []
        for number in range(options.tasks):
            prompt = Conversation(messages=(Message(role="user", content=f"Question {number}?"),))
            texts = [f"Answer {k} to question {number}." for k in range(options.responses)]
            items.append((prompt, [Completion(prompt_id=prompt.id, text=text, policy="sft") for text in texts]))
        store.add_tasks("load", items, overlap=options.annotators)


def quantiles(times: list[float]) -> dict[str, float]:
    """Return the median, 95th and 99th percentile and the maximum, in milliseconds."""
    ordered = sorted(times)
    places = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: 1000 * ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in places.items()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured; raises SystemExit where a judgement was lost or doubled."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as after:
        database = options.database or str(Path(folder) / "preferences.db")
        fill(database, options)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            server = Server(database=database, port=free.getsockname()[1])
        after.callback(server.kill)
        server.start()
        log = Log()
        began = time.perf_counter()
        asyncio.run(storm(server, options, log))
        seconds = time.perf_counter() - began
        server.kill()
        with Store(database) as store:
            stored = [(row["annotator"], row["task_id"]) for row in store.ranking_rows("load")]
            rows = store.counts()["rankings"]
    wanted = options.annotators * options.tasks
    lost = set(log.acknowledged) - set(stored)
    figures = {
        "database": "postgresql" if options.database else "sqlite",
        "judgements": rows,
        "wanted": wanted,
        "lost": len(lost),
        "doubled": rows - len(set(stored)),
        "refused": len(log.refused),
        "retries": log.retries,
        "kills": options.kills,
        "annotators": options.annotators,
        "seconds": seconds,
        "per_second": rows / seconds,
        "post_ms": quantiles(log.post_s),
        "fetch_ms": quantiles(log.fetch_s),
    }
    if lost or rows != wanted or len(set(stored)) != wanted:
        raise SystemExit(f"judgements were lost or doubled: {figures}")
    return figures


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--database", default="", help="a PostgreSQL URL; by default a SQLite file")
    options.add_argument("--annotators", type=int, default=50)
    options.add_argument("--tasks", type=int, default=200)
    options.add_argument("--responses", type=int, default=4)
    options.add_argument("--kills", type=int, default=5)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--results", type=Path, default=RESULTS)
    return options.parse_args(words)


def main() -> None:
    """Measure, print and write."""
    options = parse()
    figures = run(options)
    kept = json.loads(options.results.read_text()) if options.results.is_file() else {}
    kept["machine"] = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    kept[figures["database"]] = figures
    atomic_write(options.results, json.dumps(kept, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
