"""The key of a language model's endpoint is nowhere: not in logs, tables, keys, the report or Snakemake's own files."""

import base64
import http.server
import json
import re
import threading

import pytest
import yaml

from tests.workflow.conftest import INK

pytestmark = pytest.mark.workflow
KEY = "sk-canary-0123456789-abcdefghij"
HEADER = "concept,kind,target,anchor,neighbors,steps\n"
TRACES = (
    KEY,
    base64.b64encode(KEY.encode()).decode(),
    base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    KEY[::-1],
)


@pytest.fixture
def server():
    """An endpoint that answers with captions or, told to fail, with an error that repeats the whole request's head."""

    class Handler(http.server.BaseHTTPRequestHandler):
        fail, keys = False, []

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            type(self).keys.append(self.headers["Authorization"])
            captions = "\n".join(
                f"a quiet picture of a {word} at noon" for word in ("cat", "hill", "boat", "tree")
            )
            answer = {"choices": [{"message": {"content": captions}, "finish_reason": "stop"}]}
            status = 200
            if type(self).fail:
                status, answer = 401, {"error": {"message": f"wrong key in {dict(self.headers)}"}}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


def traces(folder) -> list[str]:
    """The files below a folder, Snakemake's own among them, that hold the key, plain or coded, in name or content."""
    found = []
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file() or "models" in path.parts:
            continue
        content = path.read_bytes() + str(path).encode()
        if any(trace.encode() in content for trace in TRACES):
            found.append(str(path))
    return found


def test_the_key_is_used_and_never_written(make_checkout, server, monkeypatch):
    checkout = make_checkout()
    checkout.write(HEADER + INK)
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    own = yaml.safe_load((checkout.folder / "small.yaml").read_text())
    own["prompts"] |= {"source": "endpoint", "endpoint": {"base_url": url, "model": "m"}}
    own["runtime"] |= {"prompt_requests": 2}
    (checkout.folder / "small.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    run = ("--cores", "2", "--configfile", "small.yaml")

    server.RequestHandlerClass.fail = True
    failed = checkout.snakemake(*run)
    assert failed.returncode != 0 and "write_prompts failed, for ink" in failed.stdout, failed.stdout
    assert f"Bearer {KEY}" in server.RequestHandlerClass.keys, "the server never saw the key"
    assert KEY not in failed.stdout
    (answers,) = (checkout.folder / "results" / "prompts").glob("*.answers.jsonl")
    assert "[key]" in answers.read_text(), "the server repeated it"

    server.RequestHandlerClass.fail = False
    done = checkout.snakemake(*run)
    assert done.returncode == 0, done.stdout
    assert KEY not in done.stdout
    assert (checkout.folder / "results" / "report" / "index.html").exists()
    assert list((checkout.folder / ".snakemake").rglob("*.log")), "Snakemake's own files are searched too"
    assert traces(checkout.folder) == []


@pytest.mark.parametrize(
    "setting",
    [f"api_key={KEY}", f"prompts={{endpoint: {{key: {KEY}}}}}", f"runtime={{prompt_key_variable: {KEY}}}", f"prompts={{endpoint: {{base_url: 'http://user:{KEY}@h/v1'}}}}"],
)  # fmt: skip
def test_the_config_takes_no_key_and_repeats_none(make_checkout, setting):
    checkout = make_checkout()
    checkout.write(HEADER + INK)
    done = checkout.snakemake("--cores", "1", "--configfile", "small.yaml", "--config", setting)
    assert done.returncode != 0 and re.search("unknown key|not shown", done.stdout), done.stdout
    assert KEY not in done.stdout and traces(checkout.folder) == []
