"""A chat endpoint on this machine for the tests of ``minillm judge``, judges of several characters, and evaluations."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from minillm.judge import JudgeSettings

Json = dict[str, Any]
Answering = Callable[[Json], Any]
"""From a request's body to a reply's text, or to (status, headers, content)."""


class Server:
    """Chat completions on a port of this machine; every request is kept."""

    def __init__(self) -> None:
        self.answer: Answering = lambda body: "Scores: 5 5"
        self.requests: list[Json] = []
        self.headers: list[dict[str, str]] = []
        self.usage: Json | None = {"prompt_tokens": 100, "completion_tokens": 10}
        self.busy = self.most_busy = 0
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append({"path": self.path, **body})
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                try:
                    found = outer.answer(body)
                finally:
                    with lock:  # before the reply: a client that has it may ask again at once
                        outer.busy -= 1
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that did not wait
                    self._reply(found)

            def _reply(self, found: Any) -> None:
                if isinstance(found, str):
                    message = {"choices": [{"message": {"role": "assistant", "content": found}}], "model": "judge-0613"}
                    found = (200, {}, json.dumps(message | ({"usage": outer.usage} if outer.usage else {})))
                status, headers, content = found
                raw = content if isinstance(content, bytes) else content.encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def evaluation(folder: Path, texts: list[str], *, references: bool = True, seeds: tuple[int, ...] = (10,)) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"schema": 1, "measures": {}}))
    rows = [
        {
            "uid": f"test-{n}",
            "seed": seed,
            "temperature": temperature,
            "prompt": f"Question {n}?",
            "response": f"{text} seed {seed}" if seed != 10 or temperature != 1.0 else text,
            "references": [f"gold {n}", "another"] if references else [],
            "measures": {},
        }
        for temperature in (1.0, 0.5)
        for seed in seeds
        for n, text in enumerate(texts)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(server: Server, **changes: Any) -> JudgeSettings:
    plain = {"url": server.url, "model": "judge", "backoff": 0.01, "timeout": 5.0, "retries": 2, "concurrency": 2}
    return JudgeSettings(**{**plain, **changes})


def shown(body: Json) -> tuple[str, str]:
    """The two answers of a request, as the judge reads them."""
    text = body["messages"][0]["content"]
    first, second = (re.search(rf"<answer_{n}>\n(.*?)\n</answer_{n}>", text, re.DOTALL) for n in (1, 2))
    assert first and second
    return first[1].removeprefix("| "), second[1].removeprefix("| ")


def fair(body: Json) -> str:
    """A judge that likes "good" and has no preference for a place."""
    first, second = (text.startswith("good") for text in shown(body))
    return f"Because.\n**Verdict: {'tie' if first == second else '1' if first else '2'}**"


def points(body: Json) -> str:
    """Gold gets 8, good 6, bad 2."""
    worth = {"gold": 8, "good": 6, "bad": 2}
    return "Reasons.\nScores: {} {}".format(*(worth[text.split()[0]] for text in shown(body)))


def failing(times: int, response: Any, then: Answering) -> Answering:
    """The first so many answers are ``response``."""
    left, lock = [times], threading.Lock()

    def answer(body: Json) -> Any:
        with lock:
            left[0] -= 1
            now = left[0] >= 0
        return response if now else then(body)

    return answer
