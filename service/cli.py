"""The command `tuneyard`. Exit codes: 0 done, 1 the job or the request failed, 2 wrong usage, 130 Ctrl-C."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from service import ratecommands
from service.report import when
from service.settings import Settings, make_home
from trainers.errors import TuneyardError, UserError
from trainers.records import DataReport, EvaluationRecord, StepRecord
from trainers.spec import JobSpec

if TYPE_CHECKING:
    from service.client import Client, Json, Update

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Supervised fine-tuning on your own cluster."
)
keys = typer.Typer(no_args_is_help=True, help="API keys (needs access to the home).")
app.add_typer(keys, name="keys")

_open = ExitStack()  # what a command opened, closed when it ends
out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False, soft_wrap=True)

HomeOption = Annotated[Path | None, typer.Option(help="The service's folder; by default TUNEYARD_HOME or ~/.tuneyard.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN|JOB", help="A run's folder, or a job's id.")]
ExportForm = Literal["adapter", "safetensors", "gguf-f16", "gguf-q8_0"]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")]
DataArgument = Annotated[list[str], typer.Argument(metavar="DATA...", help="Data files or URLs, or one JOB.yaml.")]
ModelOption = Annotated[str | None, typer.Option(help="Base model.", show_default="smollm2-135m-instruct")]
TemplateOption = Annotated[str | None, typer.Option(help="Chat template: the model's own (auto), a built-in one, or a Jinja file.")]
FormatOption = Annotated[str | None, typer.Option(help="How a row is laid out.", show_default="told by the first row")]

REPORT_WIDTH = 110
"""Columns that a report takes at most: longer lines are hard to read."""


def main() -> None:
    """Run a command; every failure that a user can meet is one line of cause and one of remedy."""
    try:
        with _open:
            app()
    except TuneyardError as error:
        _die(error.message, error.remedy)
    except Exception as error:
        if (told := _wire_failure(error)) is None:
            raise
        _die(*told)


def _wire_failure(error: Exception) -> tuple[str, str] | None:
    """(cause, remedy) of a failed request; None for any other exception."""
    import openai  # here, as in all commands that speak HTTP: it takes a second to load

    if isinstance(error, openai.APIStatusError):
        told = error.body if isinstance(error.body, dict) else {}
        message, remedy = str(told.get("message") or error.message), str(told.get("remedy") or "")
        return message.removesuffix(remedy).strip(), remedy
    if isinstance(error, openai.APIConnectionError):
        return (
            f"Nothing answers at {error.request.url.copy_with(path='/')}.",
            "Start the service with `tuneyard up`, or mend OPENAI_BASE_URL.",
        )
    return None


def _die(cause: str, remedy: str) -> None:
    err.print(f"[red]error:[/red] {_plain(cause)}")
    if remedy:
        err.print(f"  [green]fix:[/green] {_plain(remedy)}")
    sys.exit(1)


def _plain(text: str) -> str:
    """Text with nothing in it that rich would take as markup."""
    return text.replace("[", "\\[")


def _client(home: Path | None) -> Client:
    from service.client import Client

    client = Client.find(Settings.load(home=home).home)
    _open.callback(client.openai.close)
    return client


app.add_typer(ratecommands.commands(_client, out, err), name="rate")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


# -- the service -----------------------------------------------------------------------------------------------------


@app.command()
def up(
    home: HomeOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.", show_default="8790")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Dashboard of a Ray cluster that exists, http://host:8265.")] = None,
) -> None:
    """Start the service: API, runner and, unless --ray-address is given, a local Ray."""
    from service.up import up as run

    def say(line: str) -> None:
        with suppress(OSError):  # the terminal may be gone; stopping in order must not fail over it
            print(line, flush=True)

    run(Settings.load(home=home, host=host, port=port, ray_address=ray_address), say)


@app.command()
def down(home: HomeOption = None) -> None:
    """Stop the service of this home, or what a killed one left running."""
    from service.up import down as stop

    out.print("Stopped." if stop(Settings.load(home=home)) else "Nothing was running.")


@app.command()
def demo(
    home: HomeOption = None, keep: Annotated[bool, typer.Option("--keep", help="Leave the service running at the end.")] = False
) -> None:
    """The running example, start to finish: train on real data, then compare base and tuned."""
    from service.demo import demo as run

    raise typer.Exit(run(home=home, keep=keep))


@keys.command("create")
def create_key(project: Annotated[str, typer.Option(help="The project the key is for; made if need be.")], home: HomeOption = None) -> None:
    """Print a new key. It cannot be shown again."""
    from service.store import Store, key_name

    settings = Settings.load(home=home)
    make_home(settings)
    store = Store(settings.database_url)
    store.migrate()
    key = store.create_key(project)
    sys.stdout.write(key + "\n")
    err.print(f"In reports this key is {key_name(key)}.")
    store.close()


# -- data ------------------------------------------------------------------------------------------------------------


@app.command()
def check(
    data: DataArgument,
    model: ModelOption = None,
    template: TemplateOption = None,
    format: FormatOption = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Longest example, in tokens.", show_default="2048")] = None,
    validation: Annotated[str | None, typer.Option(metavar="FILE", help="Validation data; by default 5% of DATA.")] = None,
    slice_by: Annotated[str | None, typer.Option(metavar="COLUMN", help="Count examples by this column.")] = None,
    output: Annotated[list[Path] | None, typer.Option("--output", "-o", help="Also write the report: FILE.html or FILE.json.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """What is in the data, what is wrong with it, and whether a job on it would start. Needs no service.

    Leaves with 0 where a job would start, and with 1 where it would not.
    """
    from service import datajob, datareport
    from trainers import resolve
    from trainers.catalogue import find_any
    from trainers.fetch import ensure
    from trainers.prepare import survey

    for path in output or []:
        if path.suffix not in (".html", ".json"):
            raise typer.BadParameter(f"{path} ends neither in .html nor in .json.", param_hint="--output")
        _check_writable(path)
    spec = datajob.job_of(data, model, template, format, max_length, validation, slice_by)
    base = find_any(spec.model.base)
    resolved = resolve.defaults(spec, base)
    settings = Settings.load(home=home)
    model_dir = ensure(base, settings.models, err.print)
    with TemporaryDirectory(prefix="tuneyard-check-") as scratch, _reading() as show:
        report = survey(datajob.looking_at_everything(spec), model_dir, Path(scratch), on_progress=show)
    if (column := spec.data.slice_by) and not (report.train.slices or report.validation.slices):
        raise UserError(f"No example has a column `{column}` to slice by.", "Name a column of the data, or leave slice_by out.")
    about = datareport.about(spec)
    epoch = datareport.epoch_of(report, int(resolved.optim.batch_size), datajob.measured_speed(settings.runs, base.id))
    told = datareport.to_json(report, about, epoch)
    for path in output or []:
        _write(path, datareport.page(report, about, epoch) if path.suffix == ".html" else json.dumps(told, indent=2) + "\n")
    _print_json(told) if as_json else out.print(datareport.renderable(report, about, epoch), width=min(out.width, REPORT_WIDTH))
    if not told["starts"]:
        raise typer.Exit(1)


@app.command()
def preview(
    data: DataArgument,
    model: ModelOption = None,
    template: TemplateOption = None,
    format: FormatOption = None,
    count: Annotated[int, typer.Option("-n", min=1, max=1000, help="How many examples.")] = 3,
    row: Annotated[int, typer.Option(min=1, help="Begin with this row of the data.")] = 1,
    id: Annotated[str | None, typer.Option(help="Show one row, as file:line.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show the tokens' ids.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write them as an HTML page.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """The first examples as tokens, coloured by what is trained. Needs no service.

    Leaves with 1 where a row is shown that training would refuse.
    """
    from service import datajob, tokenview
    from trainers.catalogue import find_any
    from trainers.fetch import ensure
    from trainers.preview import preview as look

    if html:
        _check_writable(html)
    spec = datajob.job_of(data, model, template, format)
    found = look(spec, ensure(find_any(spec.model.base), Settings.load(home=home).models, err.print), count, row - 1, id)
    if html:
        _write(html, tokenview.page(found))
    if as_json:
        _print_json(found.model_dump(mode="json"))
    else:
        coloured = out.is_terminal and not out.no_color
        out.print(tokenview.renderable(found, ids, coloured), soft_wrap=not out.is_terminal)
    if any(example.error for example in found.examples):
        raise typer.Exit(1)


def _check_writable(path: Path) -> None:
    """Before the work, not after it."""
    if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
        raise UserError(f"{path} cannot be written.", "Name a file in a folder that exists and is yours.")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.", "Name a file in a folder that exists.") from None


@contextmanager
def _writing(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal; yields what to tell it: (bytes done, bytes in all)."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("", total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


@contextmanager
def _reading() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal; yields what to tell it: (rows done, rows in all)."""
    columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("", total=None, told="")

        def show(done: int, total: int) -> None:
            total = max(done, total)
            progress.update(bar, completed=done, total=total, told=f"{done:,}/{total:,} rows")

        yield show


# -- jobs ------------------------------------------------------------------------------------------------------------


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay and show progress.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload what a job file names and start the job."""
    spec = JobSpec.load(job)
    client = _client(home)
    created = client.submit(spec)
    if not follow:
        _print_json(created) if as_json else out.print(created["id"])
        return
    if not as_json:
        out.print(f"Job {created['id']}")
    _follow(client, created["id"], as_json)


@app.command("list")
def list_jobs(home: HomeOption = None, limit: Annotated[int, typer.Option(min=1, max=1000)] = 20, as_json: JsonOption = False) -> None:
    """The newest jobs."""
    jobs = _client(home).get(f"/fine_tuning/jobs?limit={limit}")["data"]
    if as_json:
        _print_json(jobs)
        return
    table = Table(box=None)
    for name in ("job", "status", "base", "created", "model"):
        table.add_column(name, overflow="fold")  # an id must be whole to be of use
    for job in jobs:
        table.add_row(job["id"], job["status"], job["model"], when(job["created_at"]), job["fine_tuned_model"] or job["queue_reason"] or "")
    out.print(table)


@app.command()
def show(
    job: JobId,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write a page of it: FILE.html.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """One job: what it is and what it does now."""
    from service import evaluationreport, jobpage

    client = _client(home)
    wire, detail = client.get(f"/fine_tuning/jobs/{job}"), client.get(f"/tuneyard/jobs/{job}")
    facts, evaluation = jobpage.facts(wire, detail, _data_line(client, job)), _evaluation(client, job)
    if output:
        steps = [StepRecord.model_validate(step) for step in client.get(f"/tuneyard/jobs/{job}/metrics")["data"]]
        _write(output, jobpage.page(facts, steps, client.events(job, set()), evaluation))
    if as_json:
        _print_json(wire | {"tuneyard": detail})
        return
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(name, _plain(value))
    for line in evaluationreport.lines(evaluation) if evaluation else []:
        table.add_row("evaluation", _plain(line))
    out.print(table)


def _evaluation(client: Client, job: str) -> EvaluationRecord | None:
    """What the job's evaluation found, once there is one."""
    import openai

    try:
        return EvaluationRecord.model_validate(client.get(f"/tuneyard/jobs/{job}/evaluation"))
    except openai.NotFoundError:
        return None


def _data_line(client: Client, job: str) -> str | None:
    """The job's data report in one line, once there is one."""
    import openai

    from service import datareport

    try:
        return datareport.line(DataReport.model_validate(client.get(f"/tuneyard/jobs/{job}/report")))
    except openai.NotFoundError:
        return None


@app.command()
def events(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job has ended.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """What happened to a job, oldest first."""
    client = _client(home)
    if follow:
        for update in client.watch(job):
            for event in update.events:
                _print_event(event, as_json)
    else:
        for event in client.events(job, set()):
            _print_event(event, as_json)


@app.command()
def logs(
    job: JobId,
    rank: Annotated[int | None, typer.Option(min=0, help="One training worker alone.", show_default="the driver and all workers")] = None,
    home: HomeOption = None,
) -> None:
    """What the newest attempt of a job printed."""
    only = "" if rank is None else f"?rank={rank}"
    sys.stdout.write(_client(home).get(f"/tuneyard/jobs/{job}/logs{only}")["text"])


@app.command()
def samples(job: JobId, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """What the model answered at each validation, beside what it should have."""
    found = _client(home).get(f"/tuneyard/jobs/{job}/samples")["data"]
    if as_json:
        _print_json(found)
        return
    if not found:
        out.print("Nothing yet: the first samples come with the first validation.")
    shown = None
    for sample in sorted(found, key=lambda sample: (sample["example"], sample["step"])):
        if sample["example"] != shown:
            shown = sample["example"]
            out.print(f"example {shown}: {_plain(sample['prompt'])}", soft_wrap=True)
            out.print(f"  reference: {_plain(sample['reference'])}", soft_wrap=True)
        out.print(f"  step {sample['step']}: {_plain(sample['answer'])}", soft_wrap=True)


@app.command()
def cancel(job: JobId, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Stop a job for good."""
    _told(_client(home).post(f"/fine_tuning/jobs/{job}/cancel"), as_json)


@app.command()
def pause(job: JobId, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Stop a job at its next checkpoint and free what it holds; `resume` goes on from there."""
    _told(_client(home).post(f"/fine_tuning/jobs/{job}/pause"), as_json)


@app.command()
def resume(job: JobId, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Queue a paused job again."""
    _told(_client(home).post(f"/fine_tuning/jobs/{job}/resume"), as_json)


@app.command()
def resize(
    job: JobId,
    workers: Annotated[int, typer.Argument(min=1, help="Training workers.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train with another number of workers from the next checkpoint on; the result is the same."""
    detail = _client(home).post(f"/tuneyard/jobs/{job}/resize", {"workers": workers})
    _print_json(detail) if as_json else out.print(f"{detail['id']} goes on with {detail['workers']} worker(s).")


def _told(job: Json, as_json: bool) -> None:
    _print_json(job) if as_json else out.print(f"{job['id']} is {job['status']}.")


# -- models ----------------------------------------------------------------------------------------------------------


@app.command()
def models(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Models that answer here."""
    found = _client(home).get("/models")["data"]
    if as_json:
        _print_json(found)
        return
    table = Table(box=None)
    for name in ("model", "what it is"):
        table.add_column(name, overflow="fold")
    for model in found:
        tuned = f"tuned from {model['base']} by {model['job_id']}" if "base" in model else "base model"
        table.add_row(model["id"], f"alias of {model['alias_of']}" if "alias_of" in model else tuned)
    out.print(table)


@app.command()
def chat(
    models: Annotated[list[str], typer.Argument(metavar="MODEL [MODEL2]", help="A model; or two, whose answers stand side by side.")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask once instead of talking.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.", show_default="what fits")] = None,
    seed: Annotated[int | None, typer.Option(help="The same answers again.")] = None,
    home: HomeOption = None,
) -> None:
    """Talk to a model, or to two side by side. In a pipe, standard input is one question. `/help` lists the commands."""
    from service.chatting import Chat, typed

    if len(models) > 2:
        raise typer.BadParameter("One model or two.", param_hint="MODEL")
    client = _client(home)
    given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    talk = Chat(client.openai, models, out, system, {name: value for name, value in given.items() if value is not None})
    question = message if message is not None or sys.stdin.isatty() else sys.stdin.read().strip()
    if question is None:
        talk.run(typed())
    elif question:
        talk.ask(question)
    else:
        raise UserError("There is no question.", "Write one to standard input, or give it with -m.")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    against: Annotated[str | None, typer.Option(metavar="BASE", help="Compare with this model.", show_default="the base of MODEL")] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Held-out conversations, or a YAML file of tasks. May be given several times.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="How answers to the conversations are scored.", show_default="exact_match")] = None,
    slice_by: Annotated[str | None, typer.Option(metavar="COLUMN", help="Compare by this column, too.")] = None,
    judge: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="URL MODEL", help="Let a model rate the answers; its key is TUNEYARD_JUDGE_KEY. URL `here`: a model of the service."
        ),
    ] = None,
    judge_cases: Annotated[int, typer.Option(min=1, help="Cases of each task that are judged.")] = 100,
    code: Annotated[
        list[str] | None, typer.Option(metavar="MODULE:FUNCTION", help="Also score answers with a function of your own.")
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK", help="Run a task of lm-evaluation-harness (the extra `eval`) on both models: its name (mmlu) or a YAML file."
        ),
    ] = None,
    benchmark_limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each benchmark task.")] = None,
    output: Annotated[list[Path] | None, typer.Option("--output", "-o", help="Also write the report: FILE.html or FILE.json.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Is MODEL better than BASE, and by more than chance? On held-out answers, tasks, by a judge, by code of your own. The id of an
    evaluation in place of MODEL comes back to that one."""
    from serve.metrics import own_code
    from service import evaluatecommand, evaluationreport
    from trainers.spec import Judge

    for path in output or []:
        if path.suffix not in (".html", ".json"):
            raise typer.BadParameter(f"{path} ends neither in .html nor in .json.", param_hint="--output")
        _check_writable(path)
    here = Judge(model=judge[1], cases=judge_cases) if judge and judge[0] == "here" else None
    sys.path.append(str(Path.cwd()))  # code of one's own lies where one works
    scorers = {entry_point: own_code(entry_point) for entry_point in code or []}  # before minutes go into answers
    client = _client(home)
    if model.startswith("eval_"):
        if task or metric or against or slice_by or here:
            raise typer.BadParameter("An evaluation that is there already takes only --judge URL, --code, --benchmark and --output.")
        created = client.get(f"/tuneyard/evaluations/{model}")
    else:
        tasks = evaluatecommand.tasks_of(task or [], metric)
        created = evaluatecommand.create(client, model, against, tasks, slice_by, here)
        err.print(f"Evaluation {created['id']}. It goes on without you; `tuneyard eval {created['id']}` comes back to it.")
    with _asking("asking") as show:
        record = evaluatecommand.follow(client, created["id"], show)
    fault = None
    try:
        if scorers or (judge and not here):
            answers = evaluatecommand.Answers(client, created["id"])
            for entry_point, scorer in scorers.items():
                answers.score_by(entry_point, scorer, record)
            if judge and not here:
                with _asking("judging") as show:
                    kept = Settings.load(home=home).home / "judged" / created["id"]
                    answers.judge_by(Judge(url=judge[0], model=judge[1], cases=judge_cases), record, kept, show)
        if benchmark:
            from service.harness import Asked, run_benchmarks

            models = Settings.load(home=home).models
            base, tuned = (Asked(name, models / evaluatecommand.base_of(client, name)) for name in (record.base, record.tuned))
            key, url = str(client.openai.api_key), str(client.openai.base_url)
            with _asking("benchmarks") as show:
                record.benchmarks = run_benchmarks(url, key, base, tuned, benchmark, err.print, show, benchmark_limit)
        if here and not record.judge:
            raise TuneyardError(f"{here.model} has judged nothing.", "The report says why.")
    except TuneyardError as error:  # what was measured before it is told all the same
        fault = error
    told = {"id": created["id"], **record.model_dump(mode="json")}
    for path in output or []:
        _write(path, evaluationreport.page(record) if path.suffix == ".html" else json.dumps(told, indent=2) + "\n")
    _print_json(told) if as_json else out.print(evaluationreport.renderable(record), width=min(out.width, REPORT_WIDTH))
    if fault:
        raise fault


@contextmanager
def _asking(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal; yields what to tell it: (requests done, requests in all)."""
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("", total=None, told="")

        def show(done: int, total: int) -> None:
            if total := max(done, total):
                progress.update(bar, completed=done, total=total, told=f"{done}/{total}")

        yield show


@app.command()
def merge(run: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Make the whole tuned model of a run: one Hugging Face folder, checked against what was trained."""
    from service.finished import Finished

    settings = Settings.load(home=home)
    found = Finished.find(run, settings)
    before = found.model
    with _writing("merging") as show:
        record = found.merge(settings, err.print, show)
    folder = found.run.path(str(record.merged))
    if as_json:
        _print_json({**record.model_dump(mode="json"), "folder": str(folder), "made": record != before})
        return
    from trainers.merge import told

    out.print(_plain(told(found.spec, record)) if record != before else "It is done already.", soft_wrap=True)
    out.print(_plain(str(folder)), soft_wrap=True)


@app.command()
def export(
    run: RunArgument,
    form: Annotated[ExportForm, typer.Option("--format", help="The adapter alone (PEFT), the whole folder, or a GGUF file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder or file to write.", show_default="in the run's folder")
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a run's model in a form that other tools read. The whole model is made first where it must be."""
    from service.finished import Finished

    settings = Settings.load(home=home)
    found = Finished.find(run, settings)
    with _writing("merging") as show:
        record = found.model if form == "adapter" else found.merge(settings, err.print, show)
    with _writing("writing") as show:
        path, made = found.export(record, form, output.absolute() if output else None, show)
    if as_json:
        _print_json({"format": form, "path": str(path), "made": made})
        return
    out.print(_plain(str(path)) if made else f"It is there already: {_plain(str(path))}", soft_wrap=True)


# -- following a job -------------------------------------------------------------------------------------------------


def _follow(client: Client, job_id: str, as_json: bool) -> None:
    """Show a job until its end; leave with 1 unless it succeeded. Ctrl-C leaves the job running."""
    job: Json = {}
    if as_json:
        for update in client.watch(job_id):
            job = update.job
            for event in update.events:
                _print_event(event, as_json)
        _print_json(job)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[told]}"))
        with Progress(*columns, TimeRemainingColumn(), console=out, transient=True) as progress:
            bar = progress.add_task("waiting", total=1, told="")
            for update in client.watch(job_id):
                job = update.job
                for event in update.events:
                    if event["type"] == "message":
                        _print_event(event, as_json)
                _show(progress, bar, update)
        out.print(f"{job['status']}: {_plain((job['error'] or {}).get('message') or job['fine_tuned_model'] or '')}", soft_wrap=True)
    if job["status"] != "succeeded":
        raise typer.Exit(1)


def _show(progress: Progress, bar: TaskID, update: Update) -> None:
    numbers = (update.detail["progress"] or {}).get("data") or {}
    told = [f"loss {numbers['train_loss']:.3f}"] if "train_loss" in numbers else []
    told += [f"{numbers['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in numbers else []
    stage = update.detail["stage"] if update.job["status"] == "running" else None
    description = stage or update.detail["queue_reason"] or update.job["status"]
    progress.update(bar, description=description, total=numbers.get("total", 1), completed=numbers.get("done", 0), told=", ".join(told))


def _print_event(event: Json, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(event) + "\n")
        return
    style = {"warn": "yellow", "error": "red"}.get(event["level"], "none")
    out.print(
        f"{time.strftime('%H:%M:%S', time.localtime(event['created_at']))}  [{style}]{_plain(event['message'])}[/{style}]", soft_wrap=True
    )


if __name__ == "__main__":
    main()
