"""Ask a language model behind an HTTP endpoint.

A client is a function `ask(prompt, seed) -> Answer`: here `endpoint`, and `local_model` for a model on this machine. A
temporary problem (a slow or busy server, an empty answer) is an Answer with a `problem`, which the caller counts,
records and retries. A mistake in the configuration is a PromptsError, or an Answer that is `final`.
"""

from __future__ import annotations

import email.utils
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from concept_ablation.prompts.templates import PromptsError

if TYPE_CHECKING:
    import requests

MAX_BYTES = 4_000_000  # of one response; 200 captions take about 20 kB
MAX_WAIT = 600.0  # seconds; if a server asks for a longer wait, the request fails
BUSY = (408, 409, 425, 429)  # the 4xx statuses that are worth a retry


@dataclass(frozen=True)
class Answer:
    """The outcome of one request. `cut`: the text ends before the model had finished.

    `problem`: what went wrong, or None; `final`: asking again can't help; `wait`: seconds to wait at least before the
    next.
    """

    text: str
    status: str = "ok"
    cut: bool = False
    problem: str | None = None
    final: bool = False
    wait: float = 0.0


Ask = Callable[[str, int], Answer]  # (prompt, seed) -> answer


def endpoint(settings: Mapping) -> Ask:
    """The chat model `model` behind the OpenAI-compatible endpoint `base_url`.

    `settings` also holds `key_variable` (the environment variable with the key, or None), `temperature`,
    `max_tokens`, `seed` (each left out of the request if None) and `timeout` (seconds for a whole request). The key
    is sent in the request's header only; if a server repeats it, `[key]` is written instead. Redirects aren't
    followed. Raises PromptsError.
    """
    import requests

    base = _read_address(settings)
    key, session = _read_key(settings["key_variable"], base), requests.Session()

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        # As `auth`: a password in ~/.netrc would replace a plain header.
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def hide(text: str) -> str:
        return text.replace(key, "[key]") if key else text

    def ask(prompt: str, seed: int) -> Answer:
        body = {"model": settings["model"], "messages": [{"role": "user", "content": prompt}]}
        body |= {name: settings[name] for name in ("temperature", "max_tokens") if settings[name] is not None}
        body |= {"seed": seed} if settings["seed"] is not None else {}
        try:
            status, headers, data = _post(
                session, f"{base}/chat/completions", body, sign, settings["timeout"]
            )
        except requests.exceptions.SSLError as error:
            return failed("tls", f"{base}: no secure connection: {hide(str(error))}", final=True)
        except requests.exceptions.Timeout:
            return failed("timeout", f"{base}: no whole answer within {settings['timeout']:g} s")
        except requests.exceptions.RequestException as error:
            return failed("connection", f"{base}: connection failed: {hide(str(error))}")
        text = hide(data.decode("utf-8", "replace"))
        if len(data) > MAX_BYTES:
            return failed("too long", f"{base}: an answer of over {MAX_BYTES} bytes", text[:2000])
        if status != 200:
            return _refused(status, headers, text, base, settings)
        return _read_completion(text, base)

    return ask


def _read_address(settings: Mapping) -> str:
    """The endpoint's address without a trailing slash. Raises PromptsError."""
    base = (settings["base_url"] or "").rstrip("/")
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise PromptsError("endpoint: 'base_url' must look like https://host/v1, without a key in it")
    if not settings["model"]:
        raise PromptsError(f"endpoint: 'model' is not set: give the name by which {base} knows its model")
    return base


def _read_key(variable: str | None, base: str) -> str:
    """The key from the environment; empty if `variable` is None. Raises PromptsError, without the key's value in it."""
    if variable is None:
        return ""
    if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", variable):  # it may be the key itself, by mistake
        raise PromptsError(
            "endpoint: 'runtime.prompt_key_variable' must be the name of an environment variable, in capitals, not the key"
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise PromptsError(
            f"endpoint: the environment variable {variable} is not set: `export {variable}=...` with the key of "
            f"{base} (also on the machines that a cluster starts jobs on), or set 'runtime.prompt_key_variable' to null"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise PromptsError(f"endpoint: {variable} holds a character that a key can't have; set it again")
    return key


def _post(
    session: requests.Session, url: str, body: Mapping, sign: Callable, timeout: float
) -> tuple[int, Mapping[str, str], bytes]:
    """Send one request; returns status, headers and body. At most a little more than MAX_BYTES of the body is read.

    `timeout`: seconds for the whole request, also if the server keeps sending single bytes.
    """
    import requests
    import urllib3

    end, data = time.monotonic() + timeout, bytearray()
    with session.post(
        url, json=body, auth=sign, timeout=timeout, stream=True, allow_redirects=False
    ) as response:
        while len(data) <= MAX_BYTES:
            try:
                part = response.raw.read1(65536, decode_content=True)
            except urllib3.exceptions.TimeoutError:
                raise requests.exceptions.Timeout from None
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise requests.exceptions.ConnectionError(str(error)) from None
            if not part:
                break
            data += part
            if time.monotonic() > end:
                raise requests.exceptions.Timeout
        return response.status_code, response.headers, bytes(data)


def _refused(status: int, headers: Mapping[str, str], text: str, base: str, settings: Mapping) -> Answer:
    """The answer for any status but 200: worth a retry, or final, with advice."""
    said = f"{base}: HTTP {status}: {_brief(text)}"
    if status in BUSY or status >= 500:
        wait = _seconds(headers.get("Retry-After"))
        if wait > MAX_WAIT:
            return failed(str(status), f"{said}; it asks to wait {wait:.0f} s: run again then", text, True)
        return failed(str(status), said, text, wait=wait)
    advice = {
        401: f"the key in {settings['key_variable']} is not accepted: set the right one",
        403: f"the key in {settings['key_variable']} may not use model {settings['model']!r}",
        404: f"no such address or model: check 'base_url' (most end in /v1) and model {settings['model']!r}",
    }.get(status, "check 'base_url', 'model' and the settings of the request")
    if 300 <= status < 400:
        advice = "the server redirects: put the final address into 'base_url'"
    return failed(str(status), f"{said}; {advice}", text, final=True)


def _read_completion(text: str, base: str) -> Answer:
    """The answer in a chat completion: its first choice."""
    try:
        choice = json.loads(text)["choices"][0]
        content, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError):
        return failed("broken", f"{base}: not a chat completion: {_brief(text)}", text)
    if not isinstance(content, str) or not content.strip():
        return failed("empty", f"{base}: an empty answer" + (", cut at 'max_tokens'" if cut else ""), text)
    return Answer(content, cut=cut)


def failed(status: str, problem: str, text: str = "", final: bool = False, wait: float = 0.0) -> Answer:
    return Answer(text[:2000], status, problem=problem, final=final, wait=wait)


def _seconds(retry_after: str | None) -> float:
    """The seconds from now that a Retry-After header (a number or a date) asks for; 0 if missing or unreadable."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _brief(text: str) -> str:
    text = " ".join(text.split())
    return (text[:200] + "...") if len(text) > 200 else text or "(nothing)"
