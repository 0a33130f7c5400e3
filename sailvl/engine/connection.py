"""HTTP to one server: its address, the key, what is tried again and what is an error."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import random
import re
import time
from contextlib import aclosing
from urllib.parse import urlsplit

import httpx

from sailvl.engine.base import EngineError
from sailvl.engine.wire import ServerError, error_message

_RETRIED = (408, 409, 429)
_LONGEST_WAIT_S = 60.0
_LONGEST_ERROR = 65536


class Connections:
    """Requests to ``base_url``, which must come from ``clean_base_url``; to be used in one event loop.

    Proxies of the environment are used, except for this machine's own addresses; redirections are not followed.
    """

    def __init__(self, base_url: str, *, key: str, timeout_s: float, keep: int) -> None:
        self._base_url, self._timeout_s = base_url, timeout_s
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=keep),
            trust_env=not is_loopback(base_url),
        )

    async def close(self) -> None:
        """Close them all."""
        await self._client.aclose()

    async def open(self, method: str, path: str, data: bytes | None, tries: Tries) -> httpx.Response:
        """An answer of status 200, its body unread.

        Raises EngineError if no server can be reached, ServerError if it refuses; both after ``tries``.
        """
        headers = {"content-type": "application/json"} if data is not None else {}
        while True:
            request = self._client.build_request(method, self._base_url + path, content=data, headers=headers)
            try:
                response = await self._client.send(request, stream=True)
            except httpx.TransportError as error:
                connecting = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                if isinstance(error, httpx.TimeoutException) and not connecting:
                    raise ServerError(f"no answer within {self._timeout_s:g} s") from error
                if await tries.more():
                    continue
                if connecting:
                    raise EngineError(f"{self._base_url}: no server can be reached ({named(error)})") from error
                raise ServerError(f"the connection was lost before an answer ({named(error)})") from error
            if response.status_code == 200:
                return response
            async with aclosing(response):
                message = await _refusal(response)
            retried = response.status_code in _RETRIED or response.status_code >= 500
            if not (retried and await tries.more(_retry_after(response.headers.get("retry-after", "")))):
                raise ServerError(f"HTTP {response.status_code}: {message}")


class Tries:
    """How often a request may be tried again, and the waits between."""

    def __init__(self, retries: int) -> None:
        self._retries, self._used = retries, 0

    async def more(self, asked_s: float | None = None) -> bool:
        """Wait as the server asked, or twice as long as before; False if there were enough tries."""
        if self._used == self._retries:
            return False
        backoff_s = min(8.0, 0.5 * 2**self._used) * random.uniform(0.5, 1.0)
        self._used += 1
        await asyncio.sleep(backoff_s if asked_s is None else min(asked_s, _LONGEST_WAIT_S))
        return True


def clean_base_url(given: str) -> str:
    """The address that paths are put behind; a version is added where there is none."""
    parts = urlsplit(given.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url is {given!r}; it must be like http://127.0.0.1:8000 or https://host/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("base_url must hold neither a password nor a query: give the key as api_key")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    if not any(re.match(r"v\d", piece) for piece in path.split("/")):
        path += "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


async def _refusal(response: httpx.Response) -> str:
    """What a refusal says, shortened."""
    if 300 <= response.status_code < 400:
        return f"it redirects to {response.headers.get('location', 'nowhere')}"
    data = b""
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > _LONGEST_ERROR:
            break
    text = data.decode("utf-8", "replace")
    try:
        text = error_message(json.loads(text))
    except ValueError:
        pass
    return text[:2000] or "no message"


def _retry_after(value: str) -> float | None:
    """Seconds to wait, from either form of the header; None if it says nothing."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def named(error: Exception) -> str:
    """An error's kind and text; those of connections often have none."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
