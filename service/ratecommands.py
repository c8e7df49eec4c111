"""`tuneyard rate`: people compare or grade the answers of models."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from trainers.errors import UserError

if TYPE_CHECKING:
    from service.client import Client, Json

HomeOption = Annotated[Path | None, typer.Option(help="The service's folder; by default TUNEYARD_HOME or ~/.tuneyard.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A study's id.")]
STUDIES = "/tuneyard/studies"
PLACES = ("first", "second")
"""What a study's models are called in tables: their names are too long for a column."""


def commands(find: Callable[[Path | None], Client], out: Console, err: Console) -> typer.Typer:
    """The commands; `find` gives the service's client."""
    app = typer.Typer(no_args_is_help=True, help="Human evaluation: blind comparison, or grades from 1 to 5.")

    @app.command()
    def create(
        data: Annotated[
            str,
            typer.Argument(
                metavar="DATA", help='JSON lines of conversations or {"prompt"}, with {"answers"} or without; or an evaluation.'
            ),
        ],
        model: Annotated[list[str] | None, typer.Option("--model", "-m", help="A model to rate; give it twice to compare two.")] = None,
        kind: Annotated[Literal["pairwise", "likert"], typer.Option(help="Which answer is better, or grades for each.")] = "pairwise",
        name: Annotated[str, typer.Option(help="What raters see above.", show_default="the file's name")] = "",
        instructions: Annotated[Path | None, typer.Option(metavar="FILE", help="Text that tells raters how to rate.")] = None,
        slice_by: Annotated[str | None, typer.Option(metavar="COLUMN", help="Results also by this column.")] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="So many rows, drawn at random.", show_default="all")] = None,
        seed: Annotated[int, typer.Option(min=0, help="Of the drawing and of the answers.")] = 0,
        temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
        max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
        wait: Annotated[bool, typer.Option(help="Stay until the answers are there.")] = True,
        home: HomeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Make a study and print the link for its raters."""
        told = _text(instructions) if instructions else ""
        if data.startswith("eval_") and not Path(data).exists():
            client = find(home)
            body: Json = {"evaluation": data}
        elif Path(data).is_file():
            client = find(home)
            body = {"file": client.openai.files.create(file=Path(data), purpose="evals").id}
        else:
            raise UserError(
                f"{data} is not a file of this machine.", "Name a local file, which is uploaded from here, or an evaluation's id."
            )
        body |= {"models": model or [], "kind": kind, "name": name, "instructions": told, "slice_by": slice_by}
        body |= {"limit": limit, "seed": seed, "temperature": temperature, "max_tokens": max_tokens}
        study = client.post(STUDIES, body)
        link = study["link"]
        if not as_json:
            out.print(f"{study['id']}: {study['items']['total']} items. For raters:", soft_wrap=True)
            out.print(Text(link), soft_wrap=True)
        if wait:
            study = _answered(client, study, err)
        if as_json:
            _print_json({**study, "link": link})
        else:
            out.print(Text(_state(study)), soft_wrap=True)
        if study["status"] == "failed":
            raise typer.Exit(1)

    @app.command("list")
    def list_studies(home: HomeOption = None, as_json: JsonOption = False) -> None:
        """The newest studies first."""
        found = find(home).get(f"{STUDIES}?limit=100")["data"]
        if as_json:
            _print_json(found)
            return
        table = Table(box=None)
        for column in ("study", "name", "kind", "status", "items", "ratings", "raters"):
            table.add_column(column, overflow="fold")
        for study in found:
            raters = study["raters"]
            counts = [str(study["items"]["total"]), str(sum(rater["rated"] for rater in raters)), str(len(raters))]
            table.add_row(study["id"], Text(study["name"]), study["kind"], study["status"], *counts)
        out.print(table)

    @app.command()
    def show(
        study: StudyArgument,
        link: Annotated[bool, typer.Option("--new-link", help="Make a new link; the old one opens nothing any more.")] = False,
        home: HomeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """How far the raters are, and what they say so far."""
        client = find(home)
        found, results = client.get(f"{STUDIES}/{study}"), client.get(f"{STUDIES}/{study}/results")
        fresh = client.post(f"{STUDIES}/{study}/link")["link"] if link else None
        if as_json:
            _print_json({"study": found, "results": results} | ({"link": fresh} if fresh else {}))
            return
        out.print(Text(f"{found['name']} ({found['kind']}): {_state(found)}"), soft_wrap=True)
        if fresh:
            out.print(Text(f"For raters: {fresh}"), soft_wrap=True)
        for rater in found["raters"]:
            out.print(Text(f"  {rater['name']}: {rater['rated']} of {found['to_rate']}{', finished' if rater['finished'] else ''}"))
        if results["ratings"]:
            for place, model in zip(PLACES, results["models"], strict=False):
                out.print(Text(f"{place}: {model}"), soft_wrap=True)
            out.print(_comparison(results) if results["kind"] == "pairwise" else _grades(results))
            for line in _notes(results):
                out.print(Text(line), soft_wrap=True)

    @app.command()
    def export(
        study: StudyArgument,
        output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.", show_default="standard output")] = None,
        ratings: Annotated[bool, typer.Option("--ratings", help="Every rating by itself instead of preference pairs.")] = False,
        home: HomeOption = None,
    ) -> None:
        """Preference pairs as JSON lines, in the format of OpenAI's DPO data."""
        form = "ratings" if ratings else "preferences"
        client = find(home)
        text = client.openai.get(f"{STUDIES}/{study}/export?form={form}", cast_to=str)
        if output is None:
            sys.stdout.write(text)
            return
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{output} cannot be written: {error.strerror}.", "Name a file in a folder that exists.") from None
        out.print(Text(f"{text.count(chr(10))} lines in {output}"), soft_wrap=True)

    @app.command()
    def retry(study: StudyArgument, home: HomeOption = None) -> None:
        """Ask the models again for the items that failed, as long as nobody has rated."""
        client = find(home)
        found = _answered(client, client.post(f"{STUDIES}/{study}/retry"), err)
        out.print(Text(_state(found)), soft_wrap=True)

    @app.command()
    def delete(study: StudyArgument, home: HomeOption = None) -> None:
        """Delete a study with all its answers and ratings. One whose answers are being made ends at once."""
        find(home).openai.delete(f"{STUDIES}/{study}", cast_to=object)
        out.print(f"{study} is deleted.")

    @app.command()
    def close(study: StudyArgument, home: HomeOption = None) -> None:
        """Take no more ratings."""
        out.print(f"{study} is {find(home).post(f'{STUDIES}/{study}/close')['status']}.")

    return app


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", "Name a text file in UTF-8.") from None


def _answered(client: Client, study: Json, err: Console) -> Json:
    """The study once it waits for no answer. Ctrl-C leaves the service at it."""
    columns = (TextColumn("asking the models"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}", style="dim"))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("", total=study["items"]["total"], told="")
        while study["status"] == "generating":
            time.sleep(0.5)
            study = client.get(f"{STUDIES}/{study['id']}")
            done = study["items"]["total"] - study["items"]["waiting"]
            progress.update(bar, completed=done, told=study["message"].replace("[", "\\["))
    return study


def _state(study: Json) -> str:
    items = study["items"]
    told = [f"{items['ready']} of {items['total']} items can be rated"]
    others = (("waiting", "wait for answers"), ("identical", "have equal answers"), ("failed", "failed"))
    told += [f"{items[state]} {what}" for state, what in others if items[state]]
    return f"{study['status']}, {', '.join(told)}. {study['message']}".strip()


def _comparison(results: Json) -> Table:
    table = Table(title="Items won (95% interval of the win rate, ties aside)", title_justify="left")
    first, second = results["models"]
    for column in ("", "items", "first won", "second won", "tie", "both bad", "win rate of first"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for name, part in (("all", results), *results["slices"].items()):
        counts = [part["items"], part["wins"][first], part["wins"][second], part["ties"], part["both_bad"]]
        table.add_row(Text(name), *map(str, counts), _share(part["win_rate"][first]))
    return table


def _grades(results: Json) -> Table:
    table = Table(title="Mean grade per item, 1 to 5 (95% interval)", title_justify="left")
    for column in ("", "", "helpfulness", "harmlessness", "honesty"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for name, part in (("all", results), *results["slices"].items()):
        for place, model in zip(PLACES, results["models"], strict=False):
            table.add_row(Text(name), place, *(_mean(grade) for grade in part["grades"][model].values()))
        if "difference" in part:
            table.add_row(Text(name), "difference", *(_mean(grade, "+") for grade in part["difference"].values()))
    return table


def _notes(results: Json) -> list[str]:
    notes = []
    if agreement := results["agreement"]:
        parts = [("", agreement)] if results["kind"] == "pairwise" else [(f" on {scale}", found) for scale, found in agreement.items()]
        for what, found in parts:
            kappa = "not defined" if found["kappa"] is None else f"{found['kappa']:.2f}"
            notes.append(f"Agreement{what}: {found['method']} {kappa}, {found['raters']} raters, {found['shared_items']} shared.")
    if (left := results.get("left_chosen")) and left["of"]:
        notes.append(f"The answer on the left was chosen in {_share(left)} of {left['of']} choices.")
    return notes


def _share(share: Json) -> str:
    return "" if share["value"] is None else f"{share['value']:.0%} ({share['low']:.0%} to {share['high']:.0%})"


def _mean(found: Json, sign: str = "") -> str:
    if found["mean"] is None:
        return ""
    interval = "" if found["low"] is None else f" ({found['low']:{sign}.2f} to {found['high']:{sign}.2f})"
    return f"{found['mean']:{sign}.2f}{interval}"


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
