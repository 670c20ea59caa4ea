"""A run of a hostile row whose prompts an endpoint writes: nothing of the row runs, and the endpoint's key is nowhere.

Not in logs, tables, keys, the report or Snakemake's own files. Page and CSV show the row inert.
"""

import base64
import csv
import http.server
import json
import re
import threading
from types import SimpleNamespace

import pytest
import yaml
from markupsafe import escape

from tests.workflow.conftest import INK

pytestmark = pytest.mark.workflow
KEY = "sk-canary-0123456789-abcdefghij"
HEADER = "concept,kind,target,anchor,neighbors,steps\n"
# What a shell, Python, SQL, a path, a page, a template and a spreadsheet would stumble over, in one row.
TARGET = "=cmd|' /C calc'!A0 $(touch canary) `touch canary` '|touch canary # {config[results]} {0} %s ${HOME}"
NEIGHBORS = [
    '../../../canary <script>alert("x")</script> \\" \'"\'',
    "@SUM(1) <img src=x onerror=alert(1)> \u05d0\u05d1",
]
RUN = ("--cores", "2", "--configfile", "small.yaml")
TRACES = (
    KEY,
    base64.b64encode(KEY.encode()).decode(),
    base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    KEY[::-1],
)


@pytest.fixture(scope="module")
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


def cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


@pytest.fixture(scope="module")
def runs(make_checkout, server):
    """A checkout after two runs: what the first said, which the endpoint refused, its answers, and what the second said.

    `new`: the names that both left in the checkout and beside it.
    """
    checkout = make_checkout()
    row = ",".join(["", "style", cell(TARGET), "picture", cell("; ".join(NEIGHBORS)), ""])
    checkout.write(f"{HEADER}{row}\n")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    own = yaml.safe_load((checkout.folder / "small.yaml").read_text())
    own["prompts"] |= {"source": "endpoint", "endpoint": {"base_url": url, "model": "m"}}
    own["runtime"] |= {"prompt_requests": 2}
    (checkout.folder / "small.yaml").write_text(yaml.safe_dump(own))
    there, key = paths(checkout.folder), {"OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    server.RequestHandlerClass.fail = True
    failed = checkout.snakemake(*RUN, **key)
    assert failed.returncode != 0 and "write_prompts failed" in failed.stdout, failed.stdout
    (answers,) = (checkout.folder / "results" / "prompts").glob("*.answers.jsonl")
    refused = answers.read_text()
    server.RequestHandlerClass.fail = False
    done = checkout.snakemake(*RUN, **key)
    assert done.returncode == 0, done.stdout
    new = {path.name for path in paths(checkout.folder) - there}
    return SimpleNamespace(
        folder=checkout.folder, failed=failed.stdout, answers=refused, said=done.stdout, new=new
    )


def paths(folder) -> set:
    return {*folder.iterdir(), *folder.parent.iterdir()}


def test_the_key_is_used_and_never_written(runs, server):
    assert f"Bearer {KEY}" in server.RequestHandlerClass.keys, "the server never saw the key"
    assert KEY not in runs.failed and KEY not in runs.said
    assert "[key]" in runs.answers, "the server repeated it"
    assert (runs.folder / "results" / "report" / "index.html").exists()
    assert list((runs.folder / ".snakemake").rglob("*.log")), "Snakemake's own files are searched too"
    assert traces(runs.folder) == []


def test_a_hostile_row_runs_to_the_end_and_nothing_of_it_runs(runs):
    assert runs.new <= {"results", ".snakemake"}, runs.new
    assert not list(runs.folder.rglob("canary"))
    names = [path.name for path in (runs.folder / "results").rglob("*")]
    assert all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        for name in names
    )

    page = (runs.folder / "results" / "report" / "index.html").read_text()
    for text in (TARGET, *NEIGHBORS):
        assert str(escape(text)) in page
    assert "<script>alert" not in page and "<img src=x" not in page and "default-src 'none'" in page
    for name in ("summary", "scores"):
        with (runs.folder / "results" / "report" / f"{name}.csv").open(newline="") as file:
            cells = [value for line in csv.reader(file) for value in line]
        texts = [value for value in cells if value[:1] in "=+-@\t\r" and not is_number(value)]
        assert texts == [] or texts == [""] * len(texts), texts
        assert any(value.startswith("'=cmd") for value in cells)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
