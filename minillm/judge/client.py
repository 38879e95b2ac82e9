"""One request to an OpenAI-compatible endpoint: sent once, its answer checked, every failure given its kind."""

from __future__ import annotations

import email.utils
import json
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

from minillm.errors import ConfigError
from minillm.judge.cost import Tokens
from minillm.judge.settings import KEY_NAME, OPENAI, OPENAI_KEY_NAME, REAL_KEY, EndpointError, JudgeSettings
from minillm.manifests import parsed
from minillm.report_text import plain

LONGEST_ANSWER = 8_000_000
"""Bytes; a longer one is no reply of a judge."""
SHOWN = 200
"""Characters of an endpoint's own words in an error."""
REDACTED = "[the key]"

_NOT_TAKEN = re.compile(r"support|unknown|unrecogni|unexpected|not permitted|not allowed|extra", re.IGNORECASE)


class Failed(Exception):
    """A request brought no reply; another try may. ``wait_s``: what the server asks to wait."""

    def __init__(self, reason: str, *, wait_s: float | None = None, charged: bool = False, down: str = "") -> None:
        super().__init__(reason)
        self.reason, self.wait_s, self.charged, self.down = reason, wait_s, charged, down


class Unreadable(Failed):
    """The server answered well, but with something that is no reply. ``used``: the tokens that it counted."""

    used: Tokens | None = None


class Refused(Failed):
    """The server refuses this very question, as too long perhaps: asking again is of no use."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said. The text as it came: ``ChatClient.redact`` it before it is written anywhere."""

    text: str
    model: str
    used: Tokens | None


def http_library() -> ModuleType:
    """The library that speaks HTTP. Raises ``ConfigError`` where it is not installed."""
    try:
        import httpx2
    except ImportError:
        raise ConfigError("a judge needs httpx2, which is not installed\n  pip install 'minillm[judge]'") from None
    return httpx2


class ChatClient:
    """Sends chat completions to one endpoint, from several threads. Use it in a ``with`` statement."""

    def __init__(self, settings: JudgeSettings, *, key: str) -> None:
        self._http = http_library()
        self._settings, self._key = settings, key
        self._secret = key if len(key) >= REAL_KEY else ""  # a filler such as "none" is a word of many a reply
        self._lock = threading.Lock()
        self._options: dict[str, Any] = {"temperature": 0, "seed": 0, "max_tokens": settings.max_tokens}
        self.notes: list[str] = []
        """Settings that the endpoint does not take."""
        self._client = self._http.Client(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=settings.timeout,
            limits=self._http.Limits(max_connections=settings.concurrency),
            follow_redirects=False,  # the key goes where the user said, and nowhere else
            trust_env=not settings.local,
        )
        named = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in ("httpx2", "httpcore2")]
        self._loggers = [logging.getLogger(name) for name in named]

    def __enter__(self) -> ChatClient:
        for logger in self._loggers:
            logger.addFilter(self._may_be_logged)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
        for logger in self._loggers:
            logger.removeFilter(self._may_be_logged)

    def _may_be_logged(self, record: logging.LogRecord) -> bool:
        # At level DEBUG the library logs the headers of answers, in which a server may have echoed anything.
        return not self._secret or self._secret not in record.getMessage()

    def redact(self, text: str) -> str:
        """Text without the key, should a server have echoed it, and without halves of characters."""
        whole = text.encode("utf-8", "replace").decode()
        return whole.replace(self._secret, REDACTED) if self._secret else whole

    def send(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """One reply. Raises a kind of ``Failed``, or ``EndpointError`` where no question would fare better."""
        while True:
            with self._lock:
                options = dict(self._options)
            body = json.dumps({"model": self._settings.model, "messages": list(messages), **options})
            status, headers, raw = self._post(body.encode())
            if status == 200:
                return _reply(raw)
            if status not in (400, 422) or not self._adapted(options, raw.decode("utf-8", "replace")):
                raise self._failure(status, headers, raw)

    def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content, all within the time-out."""
        seconds = self._settings.timeout
        deadline = time.monotonic() + seconds
        too_late = Failed(f"no answer within {seconds:g} s", charged=True)
        try:
            with self._client.stream("POST", self._settings.completions, content=body) as response:
                parts, size = [], 0
                for part in response.iter_bytes():
                    parts.append(part)
                    size += len(part)
                    if size > LONGEST_ANSWER:
                        raise Unreadable(f"an answer of more than {LONGEST_ANSWER:,} bytes", charged=True)
                    # The library's own time-out is for each piece: a server that trickles would never end.
                    if time.monotonic() > deadline:
                        raise too_late
                return response.status_code, response.headers, b"".join(parts)
        except self._http.TimeoutException:
            raise too_late from None
        except self._http.ConnectError as error:
            raise Failed("no connection", down=self._shown(str(error))) from None
        except self._http.DecodingError:
            raise Unreadable("content that does not decompress", charged=True) from None
        except self._http.TransportError as error:
            raise Failed(f"connection lost: {self._shown(str(error))}", charged=True) from None

    def _adapted(self, options: dict[str, Any], told: str) -> bool:
        """Whether a request was refused for a setting that can be left out; from now on it is."""
        if not _NOT_TAKEN.search(told) or "context" in told:  # a prompt too long is told in words of max_tokens, too
            return False
        for name in ("max_tokens", "seed", "temperature"):
            if name not in options or not re.search(rf"\b{name}\b", told):
                continue
            with self._lock:
                if name in self._options:
                    value = self._options.pop(name)
                    if name == "max_tokens":  # its newer name
                        self._options["max_completion_tokens"] = value
                    else:
                        self.notes.append(f"the endpoint takes no {name}: another judging may give other verdicts")
            return True
        return False

    def _failure(self, status: int, headers: Mapping[str, str], raw: bytes) -> Exception:
        where = self._settings.shown
        told = self._told(raw)
        if status in (429, 503):
            return Failed(f"HTTP {status}{told}", wait_s=retry_after(headers.get("retry-after")))
        if status in (408, 409, 425) or status >= 500:
            return Failed(f"HTTP {status}{told}")
        if status in (400, 413, 422):
            return Refused(f"HTTP {status}{told}")
        if status in (401, 403):
            mend = (
                "check that the key is right and may use the model"
                if self._key
                else f"no key was sent: set {KEY_NAME} in the environment\n"
                f"  ({OPENAI_KEY_NAME} goes to https://{OPENAI} alone)"
            )
            return EndpointError(f"{where} refuses access (HTTP {status}){told}\n  {mend}")
        if status == 404:
            return EndpointError(
                f"{where} is not there, or knows no model {self._settings.model!r} (HTTP 404){told}\n"
                "  check --url (it usually ends in /v1) and --model"
            )
        return EndpointError(f"{where} answers with HTTP {status}{told}\n  check --url, --model and your account")

    def _told(self, raw: bytes) -> str:
        """An endpoint's own words about a failure, cut short, with ": " before them; "" where there are none."""
        text = raw.decode("utf-8", "replace")
        try:
            found = parsed(text)
        except ValueError:
            found = None
        error = found.get("error", found.get("detail", found.get("message"))) if isinstance(found, dict) else None
        error = error.get("message", error) if isinstance(error, dict) else error
        shown = self._shown(str(error) if error else text)
        return f": {shown}" if shown else ""

    def _shown(self, text: str) -> str:
        # Before as well as after: cutting and cleaning must neither leave half a key nor join two halves.
        return self.redact(plain(self.redact(text)))[:SHOWN]


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date; None where it says nothing readable."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _reply(raw: bytes) -> Reply:
    try:
        found = parsed(raw)
    except ValueError:
        raise Unreadable("an answer that is not JSON", charged=True) from None
    used = _usage(found.get("usage")) if isinstance(found, dict) else None
    try:
        text = found["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        failure = Unreadable("an answer without choices or text", charged=True)
        failure.used = used
        raise failure
    model = found.get("model")
    return Reply(text=text, model=model if isinstance(model, str) else "", used=used)


def _usage(usage: Any) -> Tokens | None:
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else [None]
    if any(not isinstance(count, int) or isinstance(count, bool) or count < 0 for count in counts):
        return None
    return Tokens(*counts)
