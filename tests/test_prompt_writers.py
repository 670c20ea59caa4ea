"""Prompts by a language model: parsing, refusals, an HTTP server that misbehaves, a tiny local model."""

import http.server
import json
import logging
import threading
import time

import pytest

from concept_ablation.prompts import clients as language_models
from concept_ablation.prompts import local_model as local_models
from concept_ablation.prompts.answers import Collector, parse_answer
from concept_ablation.prompts.captions import instruction, write_by_model
from concept_ablation.prompts.local_model import local_model
from concept_ablation.prompts.stage import write_prompts
from concept_ablation.prompts.templates import PromptsError

KEY = "sk-Very+Secret/0123456789"
CATS = ["a cat on a wall", "two cats in the rain", "a cat asleep in a boat", "the cat under a table"]


# Answers -> prompts


@pytest.mark.parametrize(
    "text",
    [
        "a cat on a wall\ntwo cats in the rain",
        "Sure, here are two captions:\n\n1. A cat on a wall.\n2) two cats in the rain\n\nLet me know if you want more!",
        '- "a cat on a wall",\n- “two cats in the rain”',
        '["a cat on a wall", "two cats in the rain"]',
        'Here is the list:\n```json\n{"captions": [\n "a cat on a wall",\n "two cats in the rain"\n]}\n```',
        '[{"caption": "a cat on a wall"}, {"caption": "two cats in the rain"}]',
        "<think>\nthe user wants a cat\n</think>\n**1.** a cat on a wall\n**2. two cats in the rain**",
        "(1) a cat on a wall\n(2) two cats in the rain",
        "Caption 1: a cat on a wall\nCaption 2: two cats in the rain",
        "* a cat on a wall\n* two cats in the rain\nEnjoy!",
    ],
)
def test_captions_are_taken_out_of_whatever_stands_around_them(text):
    assert [line.lower() for line in parse_answer(text)] == CATS[:2]


def test_a_cut_answer_loses_its_unfinished_caption():
    assert parse_answer("a cat on a wall\ntwo cats in the", cut=True) == CATS[:1]
    assert parse_answer('["a cat on a wall", "two cats in the', cut=True) == CATS[:1]
    assert parse_answer('[{"caption": "a cat on a wall"}, {"caption": "two ca', cut=True) == CATS[:1]


def test_words_that_look_like_a_number_or_a_preamble_stay():
    captions = ["3 cats on a wall", "2.5 metres of cat", "A sure-footed cat", "Here, kitty: a cat at a door"]
    assert parse_answer("\n".join(captions)) == captions


def test_only_prompts_that_can_be_anchor_prompts_are_kept():
    found = Collector("object", "cat", ["grumpy cat", "r2d2"])
    asked = [*CATS[:2], "A CAT, on a wall!", "a delicate vase", "a Grumpy-Cat mug", "a cat beside R2-D2", "x"]
    assert found.add([*asked, "a cat " + "y" * 300, "a cat\x00"]) == 2
    assert found.prompts == CATS[:2]
    assert found.refused == {
        "repeated": 1,
        "without the anchor 'cat'": 1,
        "with a target in it": 2,
        "not of 3 to 300 characters": 2,
        "with control characters": 1,
    }
    assert "2 with a target in it" in found.refusals()


def test_a_style_needs_no_anchor_word_and_a_memorized_caption_is_refused_only_as_it_is():
    assert Collector("style", "painting", ["van gogh"]).add(["boats at dusk", "a van gogh sky"]) == 1
    memorized = Collector("memorization", "a poster", ["Ann Graham Lotz"])
    assert memorized.add(["Ann Graham Lotz at a lectern", "ann graham lotz."]) == 1


def test_the_instruction_names_anchor_targets_count_and_what_is_there():
    text = instruction("object", "cat", ["grumpy cat", "tom"], 20, CATS[:1])
    assert all(part in text for part in ("20", '"cat"', '"grumpy cat" or "tom"', CATS[0]))
    assert "A picture has this caption: Tiger" in instruction("memorization", "a tiger", ["Tiger"], 5)


# An endpoint: a server that answers from a script, one entry a request


class Server:
    def __init__(self):
        self.script, self.requests, owner = [], [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append((self.path, dict(self.headers), body))
                step = owner.script.pop(0) if len(owner.script) > 1 else owner.script[0]
                step(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def send(status, body=b"", **headers):
    def step(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return step


def say(text, finish="stop"):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return send(200, json.dumps({"choices": [choice]}).encode())


def drip(handler):
    """Sends a byte now and then: no single wait is long, the whole is."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def write(server, tmp_path):
    def write(count=2, kind="object", raw="raw.jsonl", **settings):
        settings = {
            "base_url": server.url,
            "model": "tiny-chat",
            "key_variable": "TEST_KEY",
            "temperature": 1.0,
            "max_tokens": 500,
            "prompts_per_request": 4,
            "attempts": 4,
            "timeout": 5.0,
            "seed": 7,
        } | settings
        return write_by_model(
            {"endpoint": settings},
            anchor="cat",
            kind=kind,
            targets=["grumpy cat"],
            count=count,
            raw_path=tmp_path / raw,
            backoff=0.001,
        )

    return write


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "raw.jsonl").read_text().splitlines()]


def test_an_endpoint_is_asked_until_there_are_enough(server, write, tmp_path):
    server.script = [say("\n".join(CATS[:2])), say("\n".join(CATS))]
    assert write(3) == CATS[:3]
    path, headers, body = server.requests[1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "tiny-chat" and body["max_tokens"] == 500 and body["seed"] == 8
    assert CATS[0] in body["messages"][0]["content"]
    first, second = records(tmp_path)
    assert first["answer"] == "\n".join(CATS[:2]) and first["prompt"] != second["prompt"]
    assert first["status"] == "ok" and first["seconds"] >= 0 and first["time"].startswith("20")


def test_settings_that_are_null_are_not_sent_and_no_key_is_fine(server, write, monkeypatch):
    server.script = [say("\n".join(CATS))]
    assert write(2, key_variable=None, seed=None, temperature=None, max_tokens=None) == CATS[:2]
    _, headers, body = server.requests[0]
    assert "Authorization" not in headers and set(body) == {"model", "messages"}


def test_passwords_of_the_home_folder_are_not_sent(server, write, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.script = [say(CATS[0]), say("\n".join(CATS))]
    write(1)
    write(2, key_variable=None)
    assert [headers.get("Authorization") for _, headers, _ in server.requests] == [f"Bearer {KEY}", None]


@pytest.mark.parametrize(
    ("step", "status"),
    [
        (send(429, b"busy", Retry_After="0"), "429"),
        (send(500, b"oops"), "500"),
        (send(503), "503"),
        (say(""), "empty"),
        (say(None), "empty"),
        (send(200, b'{"choices": [{"mess'), "broken"),
        (send(200, b"[]"), "broken"),
        (send(200, b"<html>wait</html>"), "broken"),
        (send(200, b'{"error": {"message": "overloaded"}}'), "broken"),
        (lambda handler: handler.connection.close(), "connection"),
        (drip, "timeout"),
        (lambda handler: time.sleep(0.4), "timeout"),
    ],
)
def test_what_can_pass_is_tried_again(server, write, tmp_path, step, status):
    server.script = [step, say("\n".join(CATS))]
    assert write(2, timeout=0.2) == CATS[:2]
    assert [record["status"] for record in records(tmp_path)] == [status, "ok"]


def test_a_connection_that_ends_early_and_a_huge_answer_are_tried_again(server, write, tmp_path, monkeypatch):
    monkeypatch.setattr(language_models, "MAX_BYTES", 2000)

    def short(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "900")
        handler.end_headers()
        handler.wfile.write(b"{")
        handler.wfile.flush()
        handler.connection.shutdown(2)

    server.script = [short, send(200, b"x" * 9000), say("\n".join(CATS))]
    assert write(2) == CATS[:2]
    tried = records(tmp_path)
    assert [record["status"] for record in tried] == ["connection", "too long", "ok"]
    assert len(tried[1]["answer"]) == 2000


def test_retry_after_is_respected(server, write):
    server.script = [send(429, Retry_After="1"), say("\n".join(CATS))]
    started = time.monotonic()
    write(2)
    assert time.monotonic() - started >= 1


def test_a_server_that_asks_for_an_hour_is_given_up(server, write):
    server.script = [send(429, Retry_After="3600")]
    with pytest.raises(PromptsError, match="asks to wait 3600 s"):
        write(2)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (send(401, b"bad key " + KEY.encode()), "key in TEST_KEY is not accepted"),
        (send(403), "may not use model 'tiny-chat'"),
        (send(404, b"no such model"), "check 'base_url'"),
        (send(400, b"unknown field seed"), "unknown field seed"),
        (send(307, Location="http://elsewhere/"), "final address into 'base_url'"),
    ],
)
def test_what_can_not_pass_is_told_at_once_and_the_key_stays_hidden(
    server, write, tmp_path, caplog, step, message
):
    caplog.set_level(logging.DEBUG)
    server.script = [say("\n".join(CATS[:1])), step]
    with pytest.raises(PromptsError, match=message) as caught:
        write(2)
    assert len(server.requests) == 2 and "1 of 2 prompts after 2 requests" in str(caught.value)
    raw = (tmp_path / "raw.jsonl").read_text()
    assert all("Secret" not in text for text in (str(caught.value), repr(caught.value), caplog.text, raw))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_server_that_echoes_the_key_does_not_bring_it_into_the_prompts(server, write, tmp_path):
    server.script = [say(f"a cat with {KEY}\na cat on a wall")]
    assert write(2) == ["a cat with [key]", "a cat on a wall"]
    assert "Secret" not in (tmp_path / "raw.jsonl").read_text()


def test_a_spent_budget_says_what_was_found_and_the_answers_serve_again(server, write, tmp_path):
    server.script = [say(f"{CATS[0]}\na grumpy cat"), send(500)]
    with pytest.raises(
        PromptsError,
        match=r"1 of 3 prompts after 2 requests.*500.*1 with a target.*Raise 'runtime.prompt_requests'",
    ):
        write(3, attempts=2)
    (tmp_path / "raw.jsonl").open("a").write('{"half')  # as a killed job leaves it
    server.script = [say("\n".join(CATS))]
    assert write(3, attempts=9) == CATS[:3]
    assert server.requests[-1][2]["seed"] == 9 and CATS[0] in server.requests[-1][2]["messages"][0]["content"]
    assert write(2) == CATS[:2] and len(server.requests) == 3  # all from the file
    assert write(1, model="other") == CATS[:1] and len(server.requests) == 4  # another question


def test_a_wrong_configuration_is_told_before_anything_is_sent(server, write, monkeypatch):
    server.script = [say("")]
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(PromptsError, match="TEST_KEY is not set"):
        write()
    monkeypatch.setenv("TEST_KEY", "two\nSecret lines")
    with pytest.raises(PromptsError, match="a key can't have") as caught:
        write()
    assert "Secret" not in str(caught.value)
    with pytest.raises(PromptsError, match="not the key") as caught:
        write(key_variable=KEY)
    assert "Secret" not in str(caught.value)
    for url in (None, "ftp://host/v1", "host/v1", "https://user:pass@host/v1"):
        with pytest.raises(PromptsError, match="base_url") as caught:
            write(base_url=url)
        assert "pass@" not in str(caught.value)
    with pytest.raises(PromptsError, match="'model' is not set"):
        write(model=None)
    with pytest.raises(PromptsError, match="must be a number"):
        write(count=None)
    assert not server.requests


def test_a_server_that_is_not_there(write, tmp_path):
    with pytest.raises(PromptsError, match=r"0 of 2 prompts after 2 requests.*connection failed"):
        write(base_url="http://127.0.0.1:9/v1", attempts=2)


# A local model


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A random Llama of one layer, whose words are captions' words, with a chat template and two terminators."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat")
    words = [
        "<pad>",
        "<eos>",
        "<|turn|>",
        "<unk>",
        "cat",
        "dog",
        "red",
        "old",
        "small",
        "on",
        "wall",
        "farewell",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=["<|turn|>"],
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message.role }} : {{ message.content }}<|turn|>{% endfor %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=2048,
            eos_token_id=1,
            bos_token_id=None,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    return folder


def local(folder, **settings):
    return {
        "path": str(folder),
        "revision": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 12,
        "seed": 3,
        "prompts_per_request": 5,
        "attempts": 20,
        "device": "cpu",
    } | settings


def test_a_local_model_is_repeatable_and_stops_at_its_terminators(chat_model):
    ask = local_model(local(chat_model))
    answers = [ask("write cat captions", seed) for seed in range(24)]
    again = local_model(local(chat_model))
    assert [again("write cat captions", seed) for seed in range(24)] == answers
    assert len({answer.text for answer in answers}) > 6
    assert {answer.cut for answer in answers} == {True, False}
    lengths = [len(answer.text.split()) for answer in answers if not answer.cut]
    assert lengths and max(lengths) < 12  # ended by a terminator
    assert not any(mark in answer.text for answer in answers for mark in ("<eos>", "<|turn|>"))


def test_terminators_are_the_configs_the_tokenizers_and_the_templates(chat_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    assert local_models.terminators(model, tokenizer) == [1, 2]
    model.generation_config.eos_token_id = [5, 1]
    assert local_models.terminators(model, tokenizer) == [5, 1, 2]


def test_prompts_by_a_local_model(chat_model, tmp_path):
    def write(name, **settings):
        return write_by_model(
            {"language_model": local(chat_model, **settings)},
            anchor="cat",
            kind="object",
            targets=["dog"],
            count=2,
            raw_path=tmp_path / name,
        )

    prompts = write("raw.jsonl", attempts=100)
    assert len(prompts) == 2
    assert all("cat" in prompt.split() and "dog" not in prompt.split() for prompt in prompts)
    assert write("other.jsonl", attempts=100) == prompts
    with pytest.raises(PromptsError, match="of 2 prompts after 1 requests"):
        write("budget.jsonl", attempts=1, max_new_tokens=1)


def test_a_model_that_is_not_there_or_no_chat_model_is_refused(chat_model, tmp_path):
    with pytest.raises(PromptsError, match="'path' is not set"):
        local_model(local(tmp_path, path=None))
    with pytest.raises(PromptsError, match="can't be loaded"):
        local_model(local(tmp_path / "nothing"))
    for file in chat_model.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(PromptsError, match="has no chat template"):
        local_model(local(tmp_path))


# The stage


def test_the_stage_writes_the_models_prompts_and_keeps_its_answers(server, tmp_path):
    server.script = [say("a cat on a wall\na grumpy cat\ntwo cats in the rain")]
    source = {"base_url": server.url, "model": "m", "temperature": 1.0, "max_tokens": 100, "seed": 0}
    spec = {"kind": "object", "anchor": "cat", "targets": ["grumpy cat"], "count": 2}
    spec["source"] = {"endpoint": {**source, "prompts_per_request": 5}}
    asking = {"device": "cpu", "attempts": 3, "timeout": 5, "key_variable": "TEST_KEY"}
    assert write_prompts(spec, tmp_path / "p.json", **asking) == CATS[:2]
    assert json.loads((tmp_path / "p.json").read_text())["prompts"] == CATS[:2]
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "a grumpy cat" in written, "the raw answer is kept"
    assert KEY not in written and server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
