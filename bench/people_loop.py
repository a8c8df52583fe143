"""The loop with people in it, from invitation to a blind comparison, by the commands of docs/people.md.

    python3 bootstrap.py bench people_loop

Invites three annotators and a lead, lets them rank what the chat model wrote, reviews, trains reward model, DPO and
PPO on it, and lets them rank the new policy against the old, blind. Everything goes through the commands and the
page's own calls; no file is touched by hand. The three are SIMULATED (the microworld's annotators sit at the page in
place of people), so their judgements are stored as a person's in this workspace: it shows the loop, not what people
think. Prints each command, what came of it, and the win rate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from trivium.config import load_attribute
from trivium.records import Conversation, Message
from trivium.runs.registry import latest_runs

ROOT = Path(__file__).resolve().parents[1]
WAITING = 3
"""The exit code of a run that waits for people."""


def trivium(*words: object, code: int = 0) -> str:
    """Run a command and return what it said; raises SystemExit for another exit code than `code`."""
    line = [str(word) for word in words]
    print(f"$ trivium {' '.join(line)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "trivium", *line], capture_output=True, text=True, check=False)
    if done.returncode != code:
        raise SystemExit(f"it ended with {done.returncode}, not {code}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


@dataclass
class Person:
    """Somebody with a browser: a session's cookie, the page's token, and (simulated) an opinion."""

    name: str
    opinion: Any
    client: httpx.Client
    ranked: int = 0
    seconds: list[float] = field(default_factory=list)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post as the page does."""
        answer = self.client.post(path, json=body)
        if answer.status_code != 200:
            raise SystemExit(f"{self.name}: {path} was refused: {answer.text}")
        return dict(answer.json())

    def greet(self) -> None:
        """Fetch the page's token."""
        self.client.headers["x-csrf-token"] = self.client.get("/api/session").json()["token"]

    def rank_all(self) -> None:
        """Rank until the page says that nothing is left."""
        rng = np.random.default_rng([len(self.name), *self.name.encode()])
        while True:
            task = self.client.get("/api/task", params={"annotator": self.name}).json()["task"]
            if task is None:
                return
            prompt = Conversation(
                messages=tuple(Message(role=m["role"], content=m["content"]) for m in task["messages"])
            )
            groups = self.opinion.rank(prompt, [response["text"] for response in task["responses"]], rng)
            body = {"task": task["id"], "annotator": self.name, "groups": [list(map(int, g)) for g in groups]}
            self.post("/api/rank", body | {"key": rng.bytes(16).hex(), "seconds": float(rng.uniform(5, 40))})
            self.ranked += 1


class Page:
    """`trivium rank --accounts`, for as long as people rank."""

    def __init__(self, workspace: Path, port: int) -> None:
        """Start the server and wait for it."""
        words = ["rank", "--workspace", str(workspace), "--accounts", "--port", str(port)]
        print(f"$ trivium {' '.join(words)}", flush=True)
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen([sys.executable, "-m", "trivium", *words], stdout=subprocess.DEVNULL)
        for _ in range(600):
            try:
                httpx.get(self.url, timeout=5)
                return
            except httpx.TransportError:
                time.sleep(0.1)
        raise SystemExit("trivium rank did not answer within a minute")

    def __enter__(self) -> Page:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the server as Ctrl-C does."""
        self.process.terminate()
        self.process.wait(20)


def invite(workspace: Path, url: str, names: list[str], opinions: list[Any]) -> list[Person]:
    """Return people, each signed in by the link that the command printed."""
    found = []
    for name, opinion in zip(names, opinions, strict=True):
        role = "lead" if name == "lea" else "annotator"
        said = trivium("people", "invite", name, "--role", role, "--workspace", workspace, "--url", url)
        token = said.partition("#invitation=")[2].split()[0]
        found.append(Person(name, opinion, httpx.Client(base_url=url, headers={"origin": url}, timeout=60)))
        found[-1].greet()
        found[-1].post("/api/join", {"token": token})
        found[-1].greet()
    return found


def all_rank(people: list[Person]) -> None:
    """Let all of them rank at the same time."""
    threads = [threading.Thread(target=person.rank_all) for person in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def review(lead: Person) -> dict[str, Any]:
    """Return what the lead sees; the worst dispute is decided as the first annotator ranked it."""
    found: dict[str, Any] = lead.client.get("/api/review").json()
    if found["disputed"]:
        worst = found["disputed"][0]
        body = {"task": worst["task"], "lead": lead.name, "groups": worst["rankings"][0]["groups"], "key": "decided"}
        lead.post("/api/adjudicate", body)
    return found


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "people.toml")
    options.add_argument("--workspace", type=Path, default=ROOT / "runs" / "people")
    options.add_argument("--port", type=int, default=8799)
    options.add_argument("--seed", type=int, default=0)
    return options.parse_args(words)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Go through the loop and return what came of it."""
    began = time.monotonic()
    recipe = (options.recipe, "--workspace", options.workspace)
    opinions = load_attribute("trivium.data.microworld:annotators")(options.seed)[:3]
    trivium("run", *recipe, code=WAITING)
    url = f"http://127.0.0.1:{options.port}"
    # Accounts before the page: it refuses to ask for accounts where there is none.
    trivium("people", "invite", "lea", "--role", "lead", "--workspace", options.workspace, "--url", url)
    with Page(options.workspace, options.port):
        people = invite(options.workspace, url, ["ann", "bob", "cyd", "lea"], [*opinions, None])
        all_rank(people[:3])
        seen = review(people[3])
    trivium("run", *recipe, code=WAITING)
    with Page(options.workspace, options.port):
        for person in people:
            person.greet()
        all_rank(people[:3])
    trivium("run", *recipe)
    manifest = latest_runs(options.workspace)["new_against_old"][1]
    (win,) = [result for result in manifest.results if result.task == "win_rate_vs_against@1"]
    return {
        "ranked": {person.name: person.ranked for person in people[:3]},
        "agreement": seen["agreement"]["pairwise"],
        "disputed": len(seen["disputed"]),
        "win_rate": {"value": win.value, "low": win.low, "high": win.high, "prompts": win.n},
        "minutes": (time.monotonic() - began) / 60,
    }


def main() -> None:
    """Run and print."""
    print(json.dumps(run(parse()), indent=1))


if __name__ == "__main__":
    main()
