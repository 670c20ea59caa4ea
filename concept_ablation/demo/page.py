"""The page: a gradio app over a catalogue and a studio. It needs the optional package gradio."""

from __future__ import annotations

import html
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from concept_ablation.common.errors import UserError
from concept_ablation.demo.catalogue import Catalogue
from concept_ablation.demo.request import LONGEST, SEEDS, STRONGEST, Picture, Request, answer
from concept_ablation.demo.strip import caption, strip, tile

if TYPE_CHECKING:
    import gradio

    from concept_ablation.demo.studio import Studio

KEPT = 60  # answers in the history
WAITING = 16  # requests that may wait, over all windows
WAYS = [("Each alone, then added up", "both"), ("Each alone", "each"), ("Added up only", "added")]
HEAD = """<h1>Try it</h1><p>Draw any prompt by the base model and, from the same noise, by models without a concept: the report's model, sampler
and seeds, so a prompt and seed of the report give its picture.</p>"""
ABOUT = """<p><b>Strength</b> is the scale of the change: weights = base + strength × change. At 0 a model is the base model, at 1 it is as it was judged.</p>
<p><b>Added up</b>, of several, is one model with the changes of all that are chosen: weights = base + strength × (change 1 + change 2 + …). This is not how a bundle is merged:
a sum also adds what each change does to all other words. A bundle's own model is in the list, under its name.</p>"""


class MissingPackage(UserError):
    """An optional package isn't installed; the message says how to install it."""


def import_gradio() -> ModuleType:
    """gradio, imported here since it is optional and takes seconds. Raises MissingPackage."""
    try:
        import gradio
    except ImportError as error:
        raise MissingPackage(
            f"the page needs gradio, which isn't installed ({error}): make demo, or pip install '.[demo]' in the checkout"
        ) from None
    return gradio


@dataclass(frozen=True)
class Answer:
    """What was drawn for a request, as the history keeps it."""

    request: Request
    pictures: tuple[Picture, ...]
    note: str


@dataclass(frozen=True)
class Parts:
    """The page's components."""

    prompt: gradio.Textbox
    seed: gradio.Number
    another: gradio.Button
    names: gradio.Dropdown
    several: gradio.Radio
    strength: gradio.Slider
    examples: gradio.Dropdown
    draw: gradio.Button
    strip: gradio.HTML
    history: gradio.Gallery
    kept: gradio.State

    @property
    def asked(self) -> list[gradio.Component]:
        return [self.prompt, self.seed, self.names, self.strength, self.several]


class Page:
    """What the page's buttons do."""

    def __init__(self, catalogue: Catalogue, studio: Studio) -> None:
        self.gradio, self.catalogue, self.studio = import_gradio(), catalogue, studio
        choices = list(catalogue.choices.values())
        self.first = next((choice for choice in choices if not choice.veiled), choices[0])

    def draw(
        self,
        prompt: str,
        seed: float | None,
        names: Sequence[str],
        strength: float,
        several: str,
        kept: Sequence[Answer],
    ) -> Iterator[tuple]:
        """The strip after each picture; at the end the history and its gallery with it."""
        request = Request((prompt or "").strip(), _whole(seed), tuple(names or ()), strength, several)
        # A strength that is typed and drawn is two events of one request: the second shows what the first drew.
        if kept and kept[0].request == request:
            yield self.show(request, kept[0].pictures, kept[0].note), self.gradio.skip(), self.gradio.skip()
            return
        began, pictures = time.monotonic(), []
        try:
            for pictures in answer(request, self.catalogue, self.studio):
                yield self.show(request, pictures, ""), self.gradio.skip(), self.gradio.skip()
        except UserError as error:
            raise self.gradio.Error(
                html.escape(str(error)), title="This can't be drawn", print_exception=False
            ) from None
        note = f"{len(pictures)} pictures in {time.monotonic() - began:.1f} s"
        others = [one for one in kept if one.request != request]
        kept = [Answer(request, tuple(pictures), note), *others][:KEPT]
        yield self.show(request, pictures, note), self.tiles(kept), kept

    def show(self, request: Request, pictures: Sequence[Picture], note: str) -> str:
        return strip(request, pictures, self.catalogue.is_veiled(request.prompt, request.names), note)

    def tiles(self, kept: Sequence[Answer]) -> gradio.Gallery:
        """The history's gallery; pictures of unsafe content are beyond recognition in it."""
        tiles = [
            (
                tile(one.pictures, self.catalogue.is_veiled(one.request.prompt, one.request.names)),
                caption(one.request, one.pictures),
            )
            for one in kept
        ]
        return self.gradio.Gallery(value=tiles, selected_index=None, visible=True)

    def again(self, kept: Sequence[Answer], place: int) -> tuple:
        """An answer of the history once more: the strip, and what was asked for."""
        one = kept[place]
        asked = one.request
        return (
            self.show(asked, one.pictures, one.note),
            asked.prompt,
            asked.seed,
            list(asked.names),
            asked.strength,
            asked.several,
        )

    def examples(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """The report's prompts and seeds for these choices: label and value."""
        return [
            (example.label, f"{name}\n{place}")
            for name in names
            for place, example in enumerate(self.catalogue.choices[name].examples)
        ]

    def offer(self, names: Sequence[str]) -> tuple[gradio.Dropdown, gradio.Radio]:
        """What can be asked of these choices: the report's prompts and, of several, how they are shown."""
        offered = self.gradio.Dropdown(choices=self.examples(names), value=None)
        return offered, self.gradio.Radio(visible=len(names) > 1)

    def take(self, label: str | None) -> tuple:
        """Prompt and seed of an example."""
        if not label:
            return self.gradio.skip(), self.gradio.skip()
        name, _, place = label.rpartition("\n")
        example = self.catalogue.choices[name].examples[int(place)]
        return example.prompt, example.seed


def _whole(number: float | None) -> int | None:
    """A number of a browser's as a whole one, if it is one."""
    return int(number) if number is not None and number == number // 1 else number


def make_page(catalogue: Catalogue, studio: Studio) -> gradio.Blocks:
    """The page as a gradio app. Raises MissingPackage."""
    page = Page(catalogue, studio)
    gr = page.gradio
    with gr.Blocks(title="Try it · concept ablation", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(HEAD, elem_classes="ca-head", js_on_load=None)
        with gr.Row(elem_id="main"):
            with gr.Column(elem_classes="ca-ask", min_width=0):
                asked = _asked(page)
            with gr.Column(elem_classes="ca-shown", min_width=0):
                shown = gr.HTML("", elem_id="answer", js_on_load=None)
            with gr.Column(elem_classes="ca-more", min_width=0):
                more = _more(page)
        history = gr.Gallery(
            label="History, the last first, until this window is closed; click one to see it again",
            elem_id="history",
            format="png",
            height="auto",
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            visible=False,
        )
        _wire(blocks, page, Parts(**asked, **more, strip=shown, history=history, kept=gr.State([])))
    return blocks.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def _asked(page: Page) -> dict[str, gradio.Component]:
    """What a request is made of, but for its strength."""
    gr, choices, first = page.gradio, page.catalogue.choices, page.first
    made = {
        "prompt": gr.Textbox(
            first.examples[0].prompt, label="Prompt", max_length=LONGEST, lines=1, max_lines=4
        ),
        "names": gr.Dropdown(
            [(choice.about, choice.name) for choice in choices.values()],
            value=[first.name],
            multiselect=True,
            label="Finished rows and bundles",
        ),
        "several": gr.Radio(WAYS, value="both", label="Several at once", visible=False),
    }
    with gr.Row():
        made["seed"] = gr.Number(
            first.examples[0].seed,
            label="Seed",
            precision=0,
            minimum=0,
            maximum=SEEDS - 1,
            scale=3,
            min_width=160,
        )
        made["another"] = gr.Button("Another seed", elem_id="another", scale=2, min_width=110)
    return made | {"draw": gr.Button("Draw", variant="primary")}


def _more(page: Page) -> dict[str, gradio.Component]:
    """The strength, the report's prompts, and what the page has to say."""
    gr, first = page.gradio, page.first
    made = {
        "strength": gr.Slider(0, STRONGEST, 1.0, step=0.05, label="Strength"),
        "examples": gr.Dropdown(
            page.examples([first.name]),
            value=None,
            label="Prompts and seeds of the report",
        ),
    }
    gr.HTML(ABOUT, elem_classes="ca-about", js_on_load=None)
    return made


def _wire(blocks: gradio.Blocks, page: Page, parts: Parts) -> None:
    """What calls what. A later request of the same button takes the place of an earlier one."""
    gr = page.gradio
    draw = {
        "fn": page.draw,
        "inputs": [*parts.asked, parts.kept],
        "outputs": [parts.strip, parts.history, parts.kept],
        "show_progress": "minimal",
        "trigger_mode": "always_last",
        "concurrency_id": "model",
        "api_visibility": "private",
    }
    plain = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    def again(kept: Sequence[Answer], picked: gradio.SelectData) -> tuple:
        return page.again(kept, picked.index)

    again.__annotations__["picked"] = gr.SelectData  # gradio finds what to pass by it

    gr.on(
        [blocks.load, parts.draw.click, parts.prompt.submit, parts.seed.submit, parts.strength.release],
        **draw,
    )
    parts.another.click(lambda: random.randrange(2**31), None, parts.seed, **plain).then(**draw)
    parts.names.change(page.offer, parts.names, [parts.examples, parts.several], **plain)
    parts.examples.input(page.take, parts.examples, [parts.prompt, parts.seed], **plain).then(**draw)
    parts.history.select(again, parts.kept, [parts.strip, *parts.asked], **plain)
