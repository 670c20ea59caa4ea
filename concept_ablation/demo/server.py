"""Serves the page to this machine's own browsers, and nothing else.

The address is bound to loopback. That alone stops neither another site's page in the same browser, which may send requests here, nor a
name that its owner points to 127.0.0.1 (DNS rebinding), so a guard stands before gradio: it answers requests to the own host and from
the own page alone, and only the few paths that the page uses. So uploads, proxies and files outside the page's own folder, which gradio
also knows, aren't there. A policy sent with every answer keeps the browser from asking any other host.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concept_ablation.common.errors import UserError
from concept_ablation.demo.page import import_gradio, make_page
from concept_ablation.demo.strip import TEMPLATES

if TYPE_CHECKING:
    import gradio

    from concept_ablation.demo.catalogue import Catalogue
    from concept_ablation.demo.studio import Studio

HOST = "127.0.0.1"
PORT = 7860
READS = (
    "/assets/",
    "/static/",
    "/svelte/",
    "/gradio_api/heartbeat/",
    "/gradio_api/startup-events",
    "/gradio_api/info",
)
READS_WHOLE = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/queue/data")
WRITES = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/run/predict")
FILES = "/gradio_api/file="
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
# torch's threads sleep while they wait for each other. Spinning, two of them took 13 times the CPU time on a busy machine.
WAITING = ("OMP_WAIT_POLICY", "PASSIVE")


class PortError(UserError):
    """The page's port can't be had; the message says what to do."""


class Guard:
    """An ASGI app before `app`: lets through what the page itself asks for.

    port: the port it is served on. folder: the only folder whose files may be read.
    """

    def __init__(self, app: Callable, port: int, folder: str | Path) -> None:
        self._app, self._folder = app, os.path.realpath(folder)
        self._hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            why = self.refuses(scope)
            await (_refuse(send, why) if why else self._app(scope, receive, _with_headers(send)))

    def refuses(self, scope: dict[str, Any]) -> str:
        """Why a request isn't answered; an empty text if it is."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        origin = headers.get("origin")
        if headers.get("host") not in self._hosts:
            return "not this host"
        if origin is not None and origin.removeprefix("http://") not in self._hosts:
            return "not from this page"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return "not from this page"
        return "" if self._is_known(scope["method"], scope["path"]) else "no such path"

    def _is_known(self, method: str, path: str) -> bool:
        if method == "POST":
            return path in WRITES
        if method not in ("GET", "HEAD") or ".." in path:
            return False
        if path.startswith(FILES):
            file = os.path.realpath(path.removeprefix(FILES))
            return file.startswith(self._folder + os.sep)
        return path in READS_WHOLE or path.startswith(READS)


async def _refuse(send: Callable, why: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": why.encode()})


def _with_headers(send: Callable) -> Callable[[dict], Awaitable[None]]:
    async def sent(message: dict) -> None:
        if message["type"] == "http.response.start":
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return sent


def serve(
    load: Callable[[], tuple[Catalogue, Studio]], port: int = PORT, told: Callable[[str], None] = print
) -> str:
    """Serve the page until Ctrl-C. `load` gives what to try; `port`: 0 takes any free one; `told` gets the address.

    Returns a last line. Raises MissingPackage and PortError before anything is loaded, and what `load` raises.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="concept-ablation-demo-"))
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
        )  # so that the folder is removed
        for name, value in {**QUIET, "GRADIO_TEMP_DIR": folder}.items():
            os.environ[name] = value
        os.environ.setdefault(*WAITING)
        import_gradio()
        listener = stack.enter_context(_listen(port))
        blocks = make_page(*load())
        address = f"http://{HOST}:{listener.getsockname()[1]}"
        told(f"{address}  (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            _run(blocks, listener, folder)
    return "ended"


def _listen(port: int) -> socket.socket:
    """A socket on loopback that no other process can share. Raises PortError."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise PortError(
            f"port {port} of {HOST}: {error.strerror}; give another with --port (0 takes any free one)"
        ) from None
    return listener


def _run(blocks: gradio.Blocks, listener: socket.socket, folder: str) -> None:
    import fastapi
    import uvicorn

    gr = import_gradio()
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        server_name=HOST,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(gr),
        css_paths=[TEMPLATES / "demo.css"],
    )
    guard = Guard(app, listener.getsockname()[1], folder)
    config = uvicorn.Config(guard, log_level="warning", timeout_graceful_shutdown=2, proxy_headers=False)
    uvicorn.Server(config).run(sockets=[listener])


def _theme(gr: Any) -> gradio.Theme:
    """The report's look: quiet greys, one blue, the system's own fonts, none of which is loaded."""
    sans = [
        gr.themes.Font(name) for name in ("Inter", "Segoe UI", "system-ui", "Liberation Sans", "sans-serif")
    ]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "DejaVu Sans Mono", "monospace")]
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="stone", font=sans, font_mono=mono)
    quiet = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_400"}
    return theme.set(**quiet, block_label_text_color="*neutral_600", block_info_text_color="*neutral_600")
