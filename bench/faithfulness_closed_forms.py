"""Our closed forms beside the published code's, on the embedded model: the functions of UCE, RECE and SPEED are run as they stand.

    git clone https://github.com/rohitgandikota/unified-concept-editing UCE
    git clone https://github.com/CharlesGong12/RECE && git clone https://github.com/Ouxiang-Li/SPEED
    python bench/faithfulness_closed_forms.py --uce UCE --rece RECE --speed SPEED

Only the functions are taken from their files (their modules import what isn't needed here), and told to compute on the CPU. SPEED's
clusters start at random in its code, so both sides get our centers; its perturbations are random too, so they are off on both sides.
Prints, for each part, the largest difference of any layer, relative to the size of the change (of the encoding, for RECE's).
"""

from __future__ import annotations

import argparse
import ast
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import torch

from concept_ablation import load_pipeline
from concept_ablation.diffusion.families.base import family_of
from concept_ablation.methods.concept_editing import Subjects, edit, projections
from concept_ablation.methods.rece import reviving
from concept_ablation.methods.speed import centers, null_projector, solve

TARGET, ANCHOR, KEPT = "owl", "bird", ["penguin", "rooster", "duck", "parrot"]


def functions_of(path: Path, names: list[str], **known: object) -> dict:
    """The functions of a file, run with `known` as its globals; nothing else in it is run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space = {"torch": torch, "copy": copy, "ast": ast, "tqdm": lambda items, **_: items, **known}
    exec(compile(tree, str(path), "exec"), space)  # noqa: S102 - of a checkout that the caller names
    return space


def difference(ours: dict, theirs: dict, base: dict) -> float:
    """The largest relative difference of two changes."""
    return max(float((ours[n] - theirs[n]).norm() / (theirs[n] - base[n]).norm()) for n in theirs)


def load(model: str):
    """The embedded model's pipeline, in the precision that is computed in."""
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it would say that nothing of it has to stay in fp32
    return load_pipeline(model, device="cpu").to(torch.get_default_dtype())


def weights_of(pipeline) -> dict:
    return {name: value.detach().double().clone() for name, value in projections(pipeline).items()}


def tokens_of(pipeline, text: str) -> torch.Tensor:
    return family_of(pipeline).encode_prompts(pipeline, [text]).hidden[0].detach()


def compare_uce(folder: Path, model: str) -> None:
    """Its whole edit. It inverts in fp32 whatever the rest is computed in."""
    import os
    import time

    saved: dict = {}
    known = {"os": os, "time": time, "print": lambda *_: None, "device": "cpu"}
    known |= {"torch_dtype": torch.get_default_dtype(), "save_file": lambda state, path: saved.update(state)}
    theirs = functions_of(folder / "trainscripts/uce_sd_erase.py", ["UCE"], **known)
    pipeline = load(model)
    base = weights_of(pipeline)
    theirs["UCE"](pipeline, [TARGET], [ANCHOR], [ANCHOR, *KEPT], 1, 1, 0.5, ".", "x")
    last = Subjects(pipeline, "{}", "last")
    kept = [last.of(word) for word in (ANCHOR, *KEPT)]
    ours = {name: edit(value, [last.pair(TARGET, ANCHOR)], kept, 1.0, 1.0, 0.5) for name, value in base.items()}  # fmt: skip
    found = {f"unet.{name}": value.detach().double() for name, value in saved.items()}
    print(f"UCE, its edit of {len(found)} layers: {difference(ours, found, base):.1e}")


def compare_rece(folder: Path, model: str) -> None:
    """Its reviving encoding after an edit of ours, and its edit of that encoding."""
    quiet = {"print": lambda *_: None}
    found = functions_of(folder / "utils/embedding_calculation/close_form_emb.py", ["close_form_emb_regzero"], **quiet)  # fmt: skip
    adversarial = functions_of(folder / "erase_methods/uce.py", ["edit_model_adversarial"], **quiet)
    first, edited = load(model), load(model)
    for one in (first, edited):
        encoder = one.text_encoder
        one.text_encoder = lambda ids, encoder=encoder: (encoder(ids)[0].detach(),)
    base, owl = weights_of(first), tokens_of(load(model), TARGET)
    plain = load(model)
    anchor, kept = tokens_of(plain, ANCHOR), [tokens_of(plain, text) for text in KEPT]
    for value in projections(edited).values():
        value.copy_(edit(value, [(owl, anchor)], kept, 1.0, 0.1, 0.1))
    now = weights_of(edited)
    _, theirs = found["close_form_emb_regzero"](edited, first, TARGET, regeular_scale=0.1)
    moved = reviving(list(now.values()), list(base.values()), 0.1)
    ours = owl.double() @ moved.T
    print(f"RECE, reviving encoding: {float((ours - theirs[0].double()).norm() / theirs.norm()):.1e}")
    edited = adversarial["edit_model_adversarial"](
        edited, [theirs[0]], [anchor], KEPT, technique="replace", lamb=0.1, erase_scale=1.0, preserve_scale=0.1
    )  # fmt: skip
    after = {name: edit(value, [(theirs[0], anchor)], kept, 1.0, 0.1, 0.1) for name, value in now.items()}
    print(f"RECE, its erasure: {difference(after, weights_of(edited), now):.1e}")


def compare_speed(folder: Path, model: str) -> None:
    """Its edit of all values, without perturbations and filter."""
    import re

    pipeline = load(model)
    empty = tokens_of(pipeline, "")
    middle = centers(empty[1:].double(), 3)
    names = ["get_token_id", "generate_perturbed_embs", "edit_model"]
    theirs = functions_of(folder / "train_erase_null.py", names, re=re, print=lambda *_: None, kmeans=lambda **_: (None, middle.to(empty)))  # fmt: skip
    args = SimpleNamespace(params="V", aug_num=0, disable_filter=True, threshold=0.1, retain_scale=1.0, lamb=0.0)  # fmt: skip
    encoder = pipeline.text_encoder
    given = SimpleNamespace(
        unet=pipeline.unet,
        tokenizer=pipeline.tokenizer,
        text_encoder=lambda ids: SimpleNamespace(last_hidden_state=encoder(ids)[0]),
    )
    made = theirs["edit_model"](args, given, [TARGET], [ANCHOR], list(KEPT), "SPEED", emb_size=empty.shape[1], device="cpu")  # fmt: skip
    last = Subjects(pipeline, "{}", "last")
    target, anchor = (last.of(word).double() for word in (TARGET, ANCHOR))
    space = null_projector(torch.cat([last.of(word).double() for word in KEPT]), 0.1)
    fixed, base, ours = torch.cat([empty[:1].double(), middle]), weights_of(pipeline), {}
    for name in made:
        old = base[f"unet.{name}"]
        ours[f"unet.{name}"] = old + solve(old, target, anchor, space, fixed, 1.0)
    found = {f"unet.{name}": value.double() for name, value in made.items()}
    print(f"SPEED, its edit of {len(found)} layers: {difference(ours, found, base):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uce", type=Path, help="a checkout of the published code of UCE")
    parser.add_argument("--rece", type=Path, help="a checkout of the published code of RECE")
    parser.add_argument("--speed", type=Path, help="a checkout of the published code of SPEED")
    parser.add_argument("--fp32", action="store_true", help="as their code computes; else in double precision")  # fmt: skip
    parser.add_argument("--model", default=str(ROOT / "embedded" / "emoji-diffusion"))
    options = parser.parse_args()
    if not options.fp32:
        torch.set_default_dtype(torch.float64)
    with torch.no_grad():
        if options.uce:
            compare_uce(options.uce, options.model)
        if options.rece:
            compare_rece(options.rece, options.model)
        if options.speed:
            compare_speed(options.speed, options.model)


if __name__ == "__main__":
    main()
