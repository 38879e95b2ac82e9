"""How an endpoint is asked, and what may be spent. The key is no setting: it comes from the environment only."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from pydantic import model_validator

from minillm.errors import ConfigError, MinillmError
from minillm.settings import Count, NonNegative, Positive, Settings, Text, Whole

KEY_NAME = "MINILLM_JUDGE_KEY"
"""Environment variable of the key, whatever the server."""
OPENAI_KEY_NAME, OPENAI = "OPENAI_API_KEY", "api.openai.com"
"""Where that is empty: another variable, which many programs set, and the only host that it is sent to."""
REAL_KEY = 8
"""A shorter key is a filler ("none", "EMPTY"), as local servers want it, and may well stand in an address."""


class EndpointError(MinillmError, ConnectionError):
    """The judge's endpoint cannot be used: it is down, refuses the key, or does not know the path or the model."""


class JudgeSettings(Settings):
    """One endpoint, and how patiently and how dearly it is asked."""

    url: Text
    """Base of an OpenAI-compatible server, such as http://localhost:8000/v1; /chat/completions is added."""
    model: Text
    concurrency: Count = 4
    """Requests under way at a time."""
    timeout: Positive = 60.0
    """Seconds for a whole answer, from the request to its last byte."""
    retries: Whole = 4
    """Further tries of one question after a rate limit, a fault of the server, a time-out or an unreadable reply."""
    max_tokens: Count = 1024
    """Longest reply, the judge's reasons included."""
    price_in: NonNegative | None = None
    """Money for a million tokens of prompts."""
    price_out: NonNegative | None = None
    """Money for a million tokens of replies."""
    max_cost: Positive | None = None
    """Most to be spent by one call: money where there are prices, else tokens."""
    backoff: Positive = 1.0
    """Seconds before the first further try; doubled each time, with jitter."""
    unencrypted_key: bool = False
    """Whether a key may go over http to another machine, where all between can read it."""

    @model_validator(mode="after")
    def _check(self) -> JudgeSettings:
        _address(self.url)
        if (self.price_in is None) != (self.price_out is None):
            raise ConfigError("price_in and price_out belong together; give both, or neither to count tokens")
        if self.price_in == 0 and self.price_out == 0 and self.max_cost is not None:
            raise ConfigError("max_cost: nothing costs anything at prices of 0; leave the prices out to limit tokens")
        return self

    @property
    def completions(self) -> str:
        """Where requests go."""
        parts = _address(self.url)
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        return parts._replace(path=path, fragment="").geturl()

    @property
    def shown(self) -> str:
        """Host and path, as they stand in files and messages: without scheme and query."""
        parts = urlsplit(self.completions)
        return f"{parts.netloc}{parts.path}"

    @property
    def local(self) -> bool:
        """Whether the server is on this machine: then no proxy stands between, and a key may travel unencrypted."""
        host = _address(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def openai(self) -> bool:
        """Whether the server is OpenAI's, as its certificate proves."""
        parts = _address(self.url)
        return parts.scheme == "https" and parts.hostname == OPENAI

    @property
    def bare(self) -> bool:
        """Whether a key would travel unencrypted, and off this machine."""
        return _address(self.url).scheme == "http" and not self.local


def read_key(settings: JudgeSettings, environment: Mapping[str, str] | None = None) -> str:
    """The endpoint's key, "" for none. Raises ``ConfigError``, without showing it, where it cannot or must not be
    sent."""
    environment = os.environ if environment is None else environment
    # A key of OpenAI's stands in many an environment, and whoever answers at another address could use it.
    names = (KEY_NAME, OPENAI_KEY_NAME) if settings.openai else (KEY_NAME,)
    name = next((name for name in names if environment.get(name, "").strip()), "")
    key = environment[name].strip() if name else ""
    if not (key.isascii() and key.isprintable() and " " not in key) and key:
        raise ConfigError(f"{name}: holds characters that no header may have; set it to the key alone")
    if len(key) >= REAL_KEY and (key in settings.url or key in settings.model):
        raise ConfigError(f"the key in {name} stands in --url or --model as well, which files would show; take it out")
    if key and settings.bare and not settings.unencrypted_key:
        raise ConfigError(
            f"the key in {name} would travel unencrypted to {settings.shown}, where others can read it\n"
            f"  give an https address, or leave {name} empty if the server needs none; --unencrypted-key sends it so"
        )
    return key


def _address(url: str) -> SplitResult:
    """The parts of an address. The address itself is not shown where it may hold a password."""
    wanted = "wanted an address such as http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        _ = parts.port  # a number, or it raises
    except ValueError as error:
        raise ConfigError(f"url: {error}; {wanted}") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"url: has a name or password before the host; {wanted}, and the key in {KEY_NAME}")
    if parts.scheme not in ("http", "https") or not parts.hostname or any(c.isspace() for c in url):
        raise ConfigError(f"url: got {url[:80]!r}, {wanted}")
    return parts
