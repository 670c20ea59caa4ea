"""Hostile input is inert: tables, pages, pictures, weights and model folders from a stranger run nothing and reach no other file."""

import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest
import torch
import yaml
from PIL import Image

from concept_ablation.common import image_store as imagestore
from concept_ablation.common.image_store import PictureError, open_picture
from concept_ablation.common.remote_code import find_code
from concept_ablation.diffusion.delta_import import FormatError, import_delta
from concept_ablation.diffusion.pipeline import ModelError, load_pipeline
from concept_ablation.evaluation.clip import ClipScorer
from concept_ablation.evaluation.features import FeatureError
from concept_ablation.evaluation.memorized import MemorizationError, read_picture
from concept_ablation.methods.ablation.checkpoints import load_checkpoint
from concept_ablation.plan.concept import Concept
from concept_ablation.plan.graph import PlanError, make_key
from concept_ablation.plan.model_specs import sha256_of
from concept_ablation.plan.schema import load_schema
from concept_ablation.plan.table import ConceptsError, load_concepts
from concept_ablation.prompts.templates import PromptsError, read_templates
from concept_ablation.report.tables import write_table
from tests.tiny import make_tiny_pipeline
from tests.tiny_clip import make_tiny_clip

ROOT = Path(__file__).parents[1]
VALUES = [
    "owl' OR 1=1",
    '"owl"',
    "$(touch canary)",
    "`touch canary`",
    "; touch canary",
    "../../../etc/passwd",
    "/etc/passwd",
    "<script>alert(1)</script>",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "{subject} {0} {config[results]}",
    "%s %(x)s ${HOME}",
    "\u05d0\u05d1 \u0627\u0644",
    "o\u200dwl",
]
REFUSED = [
    "owl\u202egnp",
    "owl\u200f",
    "owl\x00",
    "owl\x1b[2J",
    "owl\u2028x",
    "\ufeffowl",
    "a" * 10_000,
    "ow\x85l",
]


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A working directory in which a file `canary` would appear if something ran; checked at the end."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "canary").exists(), "it ran"


def load(tmp_path, cells: dict[str, str]) -> list[Concept]:
    row = {"kind": "object", "target": "owl", "anchor": "bird", **cells}
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in row.values()]
    (tmp_path / "concepts.csv").write_text(",".join(row) + "\n" + ",".join(quoted) + "\n", encoding="utf-8")
    schemas = [load_schema(ROOT / f"workflow/schemas/{name}.schema.yaml") for name in ("concepts", "config")]
    return load_concepts(tmp_path / "concepts.csv", *schemas)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("column", ["target", "anchor"])
def test_a_hostile_value_is_kept_as_it_is_and_names_no_other_file(tmp_path, column, value):
    (row,) = load(tmp_path, {column: value})
    words = [word.strip() for word in value.split(";") if word.strip()] if column == "target" else [value]
    assert (list(row.targets) if column == "target" else [row.anchor]) == words
    key = make_key(f"object-{value}", {"target": value})
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") and not key.startswith(".")


@pytest.mark.parametrize("value", REFUSED)
@pytest.mark.parametrize("column", ["target", "anchor", "neighbors", "concept", "prompts", "delta", "preset"])
def test_a_value_that_deceives_or_is_too_long_is_refused(tmp_path, column, value):
    with pytest.raises(ConceptsError, match=f"concepts.csv:2: column '{column}'") as raised:
        load(tmp_path, {column: value})
    assert "\n" not in str(raised.value).partition("\n")[2] and len(str(raised.value)) < 600


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "-rf", "a b", "$(x)", "a" * 65])
def test_a_name_is_a_plain_word(tmp_path, name):
    with pytest.raises(ConceptsError, match="column 'concept'.*has the wrong form"):
        load(tmp_path, {"concept": name})


def test_no_cell_of_the_csv_starts_a_formula_and_numbers_stay_numbers(tmp_path):
    texts = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "\uff1d1", "plain", "a=b", None]
    table = pa.table({"text": texts, "number": [-1.5] * len(texts)})
    write_table([table], tmp_path / "t.parquet", table.schema)
    read = pa.csv.read_csv(tmp_path / "t.csv", parse_options=pa.csv.ParseOptions(newlines_in_values=True))
    assert read["text"].to_pylist() == [f"'{text}" for text in texts[:7]] + ["plain", "a=b", ""]
    assert read["number"].to_pylist() == [-1.5] * len(texts)
    assert pa.parquet.read_table(tmp_path / "t.parquet")["text"].to_pylist() == texts


@pytest.mark.parametrize("path", ["/dev/zero", "/", "pipe"])
def test_what_is_no_file_is_not_read(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(PromptsError, match="it is not a regular file"):
        read_templates(path)
    with pytest.raises(PlanError, match="column 'delta'.*it is not a regular file"):
        sha256_of(path, "delta")
    with pytest.raises(ConceptsError, match="it is not a regular file"):
        load_concepts(path, {"properties": {}}, load_schema(ROOT / "workflow/schemas/config.schema.yaml"))


# Pictures.


def png_of(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that claims to be of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8_000, 8_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(*size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was unpacked"))
    with pytest.raises(PictureError, match="pixels.*make it smaller"):
        open_picture(path)
    sha256 = __import__("hashlib").sha256(path.read_bytes()).hexdigest()
    with pytest.raises(MemorizationError, match="bomb.png.*make it smaller"):
        read_picture(str(path), sha256)


def test_a_picture_bomb_in_a_store_is_named(tmp_path):
    path = tmp_path / "s.parquet"
    row = {"image": Image.new("RGB", (8, 8)), "prompt": "p", "seed": 1, "index": 0}
    imagestore.write_store(path, [row], {})
    store = imagestore.read_store(path)
    bomb = pa.array([{"bytes": png_of(20_000, 20_000), "path": "x"}], store.table.schema.field("image").type)
    store.table = store.table.set_column(0, "image", bomb)
    with pytest.raises(imagestore.StoreError, match="s.parquet: image 0 is damaged.*pixels"):
        store.image(0)


@pytest.mark.parametrize(
    "content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n(canary) (w) file", b"<svg/>", png_of(8, 8)[:40]]
)
def test_what_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "p.png").write_bytes(content)
    with pytest.raises(OSError, match=".") as raised:
        open_picture(tmp_path / "p.png")
    assert isinstance(raised.value, PictureError)


# Pickles.


class Bomb:
    """An object whose unpickling would make a file."""

    def __reduce__(self):
        return (open, ("canary", "w"))


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("hostile") / "pipeline", size=32)


def bomb(path: Path, form: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "zip":
        torch.save(
            {"state_dict": {"x": Bomb()}, "unet": {"x": Bomb()}, "fingerprint": Bomb(), "state": {}}, path
        )
    else:
        path.write_bytes(pickle.dumps({"unet": Bomb()}))
    return path


def test_the_bomb_goes_off_where_it_is_trusted(tmp_path, monkeypatch):
    """So that the tests below prove something."""
    monkeypatch.chdir(tmp_path)
    torch.load(bomb(tmp_path / "b.bin", "zip"), weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("form", ["zip", "pickle"])
@pytest.mark.parametrize("name", ["delta.bin", "delta.pt", "delta.ckpt", "delta.safetensors"])
def test_a_pickle_bomb_is_no_delta(canary, pipeline_folder, name, form):
    with pytest.raises((FormatError, ValueError), match=name):
        import_delta(bomb(canary / name, form), pipeline_folder)


@pytest.mark.parametrize("form", ["zip", "pickle"])
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model.bin"])
def test_a_pickle_bomb_is_no_model(canary, pipeline_folder, name, form):
    with pytest.raises(ModelError, match=name):
        load_pipeline(bomb(canary / name, form), device="cpu", config=str(pipeline_folder))


@pytest.mark.parametrize("form", ["zip", "pickle"])
@pytest.mark.parametrize(
    ("part", "name"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")],
)
def test_a_pickle_bomb_in_a_pipelines_folder_is_refused(canary, pipeline_folder, part, name, form):
    import shutil

    folder = canary / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    (folder / part / f"{name}.safetensors").unlink()
    bomb(folder / part / f"{name.replace('model', 'pytorch_model') if name == 'model' else name}.bin", form)
    with pytest.raises(ModelError, match="pipeline"):
        load_pipeline(folder, device="cpu")


def test_a_pickle_bomb_is_no_checkpoint_to_go_on_from(canary, caplog):
    assert load_checkpoint(bomb(canary / "checkpoints" / "x.pt", "zip"), {}) is None
    assert "training starts afresh" in caplog.text


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_pickle_bomb_is_no_scorer(canary, form):
    folder = make_tiny_clip(canary / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    weights = bomb(folder / "open_clip_pytorch_model.bin", form)
    with pytest.raises(FeatureError, match="can't be loaded"):
        ClipScorer(folder)
    with pytest.raises(FeatureError, match="can't be loaded"):
        ClipScorer("ViT-B-32", weights)


# Models that bring code.


@pytest.fixture
def model(canary, pipeline_folder):
    """A copy of the tiny pipeline, to be changed."""
    import shutil

    shutil.copytree(pipeline_folder, canary / "pipeline")
    return canary / "pipeline"


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_plain_pipeline_brings_no_code(pipeline_folder):
    assert find_code(pipeline_folder) is None
    shipped = ROOT / "embedded" / "emoji-diffusion"
    assert find_code(shipped) is None


CODE = "open('canary', 'w')\nfrom diffusers import UNet2DConditionModel as MyUNet, StableDiffusionPipeline as MyPipeline\n"


@pytest.mark.parametrize("how", ["script", "part", "class", "auto_map"])
def test_a_model_that_brings_code_is_refused(model, how):
    if how in ("script", "part", "class"):
        (model / "unet" / "my_unet.py").write_text(CODE)
    if how == "part":
        edit(model / "model_index.json", unet=["my_unet", "MyUNet"])
    if how == "class":
        (model / "pipeline.py").write_text(CODE)
        edit(model / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    if how == "auto_map":
        edit(model / "text_encoder" / "config.json", auto_map={"AutoModel": "x.Y"})
    with pytest.raises(ModelError, match="brings code of its own.*model.trust_remote_code"):
        load_pipeline(model, device="cpu")


def test_code_runs_only_where_the_config_allows_it(model):
    (model / "extra.py").write_text("")
    assert load_pipeline(model, device="cpu", trust_remote_code=True)


def test_the_plan_refuses_a_model_with_code(model, monkeypatch):
    from concept_ablation.plan.specs import build_plan

    (model / "extra.py").write_text(CODE)
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    for name in ("config", "embedded"):
        (model.parent / name).symlink_to(ROOT / name)
    config["model"]["path"] = str(model)
    rows = [Concept("cat", "object", ("pouting cat",), "cat")]
    with pytest.raises(PlanError, match="extra.py.*trust_remote_code"):
        build_plan(rows, config)
    config["model"]["trust_remote_code"] = True
    plan = build_plan(rows, config)
    assert all(spec["model"]["trust_remote_code"] for spec in plan.specs["sample_base"].values())
