"""A preview as people read it: tokens coloured by what is trained, in the terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from service.datareport import pages, visible
from trainers.preview import Preview, PreviewExample, PreviewToken

TRAINED = ("black on green3", "black on pale_green3")  # two shades in turn, so that each token is seen apart
CONTROL = ("bold magenta", "bold white on dark_green")  # as context, supervised
CONTEXT = "dim"

OPEN, CLOSE = "⟦", "⟧"
"""Around what is trained, where there are no colours."""


def renderable(preview: Preview, ids: bool, coloured: bool) -> RenderableType:
    """The examples one below the other; `ids` adds each token's number."""
    legend = Text("trained ", style="dim")
    legend.append("like this", style=TRAINED[0]) if coloured else legend.append(f"{OPEN}like this{CLOSE}")
    legend.append("  template ").append(preview.template).append("  base ").append(visible(preview.model))
    legend.append(f"  train_on {preview.train_on}")
    parts: list[RenderableType] = [legend]
    for example in preview.examples:
        parts += [Text(""), _head(example), *(Text(visible(note), style="yellow") for note in example.notes)]
        parts += [_tokens(example, ids, coloured)] if example.tokens else []
    return Group(*parts)


def page(preview: Preview) -> str:
    """The examples as one HTML page without any outside part."""
    examples = [(example, [(token, _lines(token.text)) for token in example.tokens]) for example in preview.examples]
    return pages().get_template("preview.html").render(preview=preview, examples=examples)


def _head(example: PreviewExample) -> Text:
    head = Text(visible(example.id), style="bold")
    if example.error is not None:
        told = str(example.error["message"]).removeprefix(example.id).removeprefix(":").strip()  # an error names its row itself
        head.append("  refused: ", style="red").append(visible(told), style="not bold")
    elif example.left_out is not None:
        head.append("  left out: ", style="yellow").append(visible(example.left_out), style="not bold")
    else:
        share = f"{example.supervised / example.num_tokens:.0%}"
        head.append(f"  {example.num_tokens:,} tokens, {example.supervised:,} supervised ({share})", style="not bold")
    return head


def _tokens(example: PreviewExample, ids: bool, coloured: bool) -> Text:
    text = Text()
    inside = False
    for place, (group, shown) in enumerate(_groups(example.tokens)):
        first = group[0]
        trained = first.weight > 0
        if not coloured and trained != inside:
            text.append(OPEN if trained else CLOSE)
        inside = trained
        style = CONTROL[trained] if first.control else TRAINED[place % 2] if trained else CONTEXT
        shown = _lines(shown)
        text.append(shown.removesuffix("\n"), style=style if coloured else "")
        if ids:
            text.append(f"({' '.join(str(token.id) for token in group)})", style="dim cyan" if coloured else "")
        text.append("\n" if shown.endswith("\n") else "")
    text.append(CLOSE if inside and not coloured else "")
    text.rstrip()
    return text


def _groups(tokens: list[PreviewToken]) -> Iterator[tuple[list[PreviewToken], str]]:
    """Tokens that only together say something, with what they say."""
    group: list[PreviewToken] = []
    for token in tokens:
        if group and (token.text or token.control):
            yield group, group[0].text
            group = []
        group.append(token)
    if group:
        yield group, group[0].text


def _lines(text: str) -> str:
    """Ends of lines and tabs that can be seen, and nothing that acts on what shows it."""
    parts = ("⏎\n" if c == "\n" else "⇥\t" if c == "\t" else visible(c) for c in text)
    return "".join(parts)
