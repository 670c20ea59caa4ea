"""Captions by an instruct model on this machine. Nothing is downloaded, and no code from the model's folder is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from concept_ablation.common.hardware import pick_device, resolve_precision
from concept_ablation.prompts.clients import Answer, Ask, failed
from concept_ablation.prompts.templates import PromptsError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def local_model(settings: Mapping) -> Ask:
    """A client of the instruct model at `path`: a folder, or a hub id in the local cache at `revision`.

    `settings` also holds `device`, `temperature` (0: always the likeliest token), `top_p` and `max_new_tokens`. The
    chat template and the end tokens are the model's own. On a CPU, equal seeds give equal answers. Raises
    PromptsError.
    """
    import torch

    device = pick_device(settings.get("device", "auto"))
    tokenizer, model = _load_instruct(settings, device)
    model.to(device).eval()
    stops = terminators(model, tokenizer)
    sampling = {"temperature": settings["temperature"], "top_p": settings["top_p"]}
    if not settings["temperature"]:
        sampling = {"temperature": None, "top_p": None, "top_k": None}

    def ask(prompt: str, seed: int) -> Answer:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(seed)
            made = model.generate(
                **inputs,
                **sampling,
                do_sample=settings["temperature"] > 0,
                max_new_tokens=settings["max_new_tokens"],
                eos_token_id=stops,
                pad_token_id=stops[0],
            )[0, inputs["input_ids"].shape[1] :].tolist()
        cut = bool(made) and made[-1] not in stops
        text = tokenizer.decode([token for token in made if token not in stops], skip_special_tokens=True)
        return Answer(text, cut=cut) if text.strip() else failed("empty", "an empty answer")

    return ask


def _load_instruct(
    settings: Mapping, device: torch.device
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The instruct model that the settings name, and its tokenizer. Raises PromptsError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not settings["path"]:
        raise PromptsError(
            "language_model: 'path' is not set: give the folder of an instruct model, or a hub id"
        )
    path = settings["path"]
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    options = {
        "revision": settings.get("revision"),
        "local_files_only": True,
        "trust_remote_code": False,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtypes[resolve_precision("auto", device)], **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise PromptsError(
            f"language model {path!r} can't be loaded: {error}\nGive the folder of an instruct model, or a hub "
            "id and revision that are in the local cache (`hf download ID --revision REVISION` puts it there)"
        ) from None
    if not tokenizer.chat_template:
        raise PromptsError(
            f"language model {path!r} has no chat template, so it follows no instructions; take an instruct "
            "(or chat) model"
        )
    return tokenizer, model


def terminators(model, tokenizer) -> list[int]:
    """The tokens that end an answer, each once: those of the generation config, the tokenizer and the chat template.

    The template's is the special token that it writes after an assistant's message; some models name it nowhere else.
    Raises PromptsError if there is none.
    """
    named = model.generation_config.eos_token_id
    stops = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "farewell"}]
    after = tokenizer.apply_chat_template(talk, tokenize=False).rpartition("farewell")[2]
    tokens = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    stops += [token for token in tokens[:1] if token in special]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if not stops:
        raise PromptsError(f"language model {tokenizer.name_or_path!r} names no token that ends an answer")
    return stops
