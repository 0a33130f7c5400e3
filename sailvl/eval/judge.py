"""A model that judges answers no rule settles, behind any OpenAI-compatible address.

What it said is kept by content (address, model, prompt, temperature), so a second scoring costs nothing and gives the
same figure. Failures are never kept and never guessed over: after a few tries the question stays unresolved, and the
report counts it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import httpx

from sailvl.eval.scoring import JudgeError
from sailvl.files import whole_lines

TRIES = 4
"""Attempts per question; between them 1, 2 and 4 seconds, or what the server asks for (at most 60)."""

_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class RemoteJudge:
    """Callable as ``judge(prompt, temperature=0.0)``, from several threads; raises JudgeError when nothing came back.

    ``cache``: a JSON-lines file of earlier replies. ``api_key`` None takes OPENAI_API_KEY. ``asked`` counts requests
    sent, ``reused`` replies from the cache.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        cache: Path | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        pause: float = 1.0,
    ) -> None:
        key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY")
        self.url = base_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.cache, self.pause = model, cache, pause
        self.asked = self.reused = 0
        self._client = httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {})
        self._lock = threading.Lock()
        self._known = _read(cache) if cache is not None else {}

    def __call__(self, prompt: str, *, temperature: float = 0.0) -> str:
        key = hashlib.sha256(json.dumps([self.url, self.model, prompt, temperature]).encode()).hexdigest()
        with self._lock:
            if key in self._known:
                self.reused += 1
                return self._known[key]
        reply = self._ask(prompt, temperature)
        with self._lock:
            self._known[key] = reply
            if self.cache is not None:
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("ab") as file:
                    line = json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n"
                    file.write(line.encode("utf-8", errors="backslashreplace"))
        return reply

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, prompt: str, temperature: float) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": 1024,
        }
        reason = ""
        for attempt in range(TRIES):
            wait = self.pause * 2**attempt
            with self._lock:
                self.asked += 1
            try:
                response = self._client.post(self.url, json=body)
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    text = _text(response)
                    if text is not None:
                        return text
                    reason = "a reply without text"
                else:
                    reason = f"status {response.status_code}"
                    if response.status_code not in _PASSING:
                        break
                    asked = response.headers.get("retry-after", "")
                    wait = min(float(asked), 60.0) if asked.isdigit() else wait
            if attempt < TRIES - 1:
                time.sleep(wait)
        raise JudgeError(f"the judge at {self.url} gave nothing ({reason})")


def _text(response: httpx.Response) -> str | None:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None


def _read(path: Path) -> dict[str, str]:
    """Replies of earlier runs; what is no reply is left out."""
    known = {}
    for line in whole_lines(path):
        try:
            row = json.loads(line)
            known[str(row["key"])] = str(row["reply"])
        except (ValueError, KeyError, TypeError):
            continue
    return known
