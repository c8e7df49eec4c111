"""`tuneyard demo`: the running example, start to finish, through the same doors that a user has.

Starts the service as a child process, submits examples/task_api with the openai client, shows progress, compares base and tuned,
and calls the tuned model. Whatever happens, nothing is left running (unless asked to keep the service).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from cluster import local
from service import report
from service.client import Client, Update
from service.settings import Settings
from trainers.errors import TuneyardError, Unavailable
from trainers.records import EvaluationRecord, ModelRecord, RunDir, TrainRecord, write_atomic
from trainers.spec import JobSpec

JOB = Path(__file__).parent.parent / "examples" / "task_api" / "job.yaml"
REQUEST = "Ask Ana to water the plants by friday, it's urgent"
START_TIMEOUT_S = 300.0  # the first start fetches the base model
STOP_TIMEOUT_S = 60.0
LINE_S = 5.0  # pause between two progress lines where no line can be redrawn
MEMORY_S = 5.0


def demo(home: Path | None = None, keep: bool = False) -> int:
    """Run the example on this home; 0 if the job succeeded, 130 when interrupted. Raises TuneyardError when it fails."""
    started = time.monotonic()
    out = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)
    settings = Settings.load(home=home)
    try:
        with _interruptible(), _PeakMemory(settings.home) as memory, _service(settings, keep, out) as client:
            shown = _Progress(out)
            job = _train(client, JobSpec.load(JOB), shown)
            run = RunDir(job.detail["run_dir"])
            told = _show_results(run, job, out)
            told |= _call_model(settings.home, client, job, out)
            took = time.monotonic() - started
            told |= {"seconds": round(took, 1), "stage_seconds": shown.stage_seconds, "peak_memory_bytes": memory.peak}
            write_atomic(run.path("report.json"), json.dumps(told, indent=2))
            stages = ", ".join(f"{stage} {report.duration(seconds)}" for stage, seconds in shown.stage_seconds.items())
            out.print(f"\nTime     {report.duration(took)} ({stages})")
            out.print(f"Memory   {report.size(memory.peak)} at most, all processes together ({memory.how})")
            out.print(f"Report   {run.path('report.json')}", soft_wrap=True)
    except KeyboardInterrupt:
        out.print("Interrupted; nothing is left running.")
        return 130
    option = f" --home {shlex.quote(str(settings.home))}" if home else ""
    out.print(f"\nThe service goes on; `tuneyard down{option}` stops it." if keep else f"\n`tuneyard up{option}` serves this model again.")
    return 0


# -- the service as a child process --------------------------------------------------------------------------------------


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make every way to stop this process a KeyboardInterrupt, so that what it started is stopped too."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _service(settings: Settings, keep: bool, out: Console) -> Iterator[Client]:
    """A running service and a client for it; stopped at the end, unless it is to be kept and all went well."""
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = settings.home / "demo.log"
    command = [sys.executable, "-m", "service.cli", "up", "--home", str(settings.home)]
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches only this process, which then stops the child in order.
        child = subprocess.Popen(
            command, cwd=JOB.parent.parent.parent, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    kept = False
    try:
        yield _wait_ready(child, settings.home, log, out)
        kept = keep
    finally:
        if not kept:
            _stop(child, settings.home)


def _wait_ready(child: subprocess.Popen[bytes], home: Path, log: Path, out: Console) -> Client:
    """Pass on what the service says while it starts, until it answers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    told = 0
    while time.monotonic() < deadline:
        dead = child.poll() is not None
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        if dead:
            error = next((line.split("error:", 1)[1].strip() for line in lines if "error:" in line), "") or " ".join(lines[-1:])
            fix = next((line.split("fix:", 1)[1].strip() for line in lines if "fix:" in line), f"Read {log}.")
            raise Unavailable(f"The service did not start: {error or f'exit code {child.returncode}'}", fix)
        with suppress(FileNotFoundError, ValueError, KeyError):
            ready = json.loads((home / "service.json").read_text(encoding="utf-8"))
            if ready["pid"] == child.pid:
                out.print(f"The service answers at {ready['base_url']}")
                return Client(ready["base_url"], (home / "key").read_text(encoding="utf-8"))
        for line in lines[told:]:
            out.print(escape(line))
        told = len(lines)
        time.sleep(0.2)
    raise Unavailable(f"The service did not answer within {START_TIMEOUT_S:.0f} s.", f"Read {log}.")


def _stop(child: subprocess.Popen[bytes], home: Path) -> None:
    """End the service and all that it started, however deaf it has become. An impatient second Ctrl-C waits."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        local.stop(home)  # finds nothing when the service could clean up by itself
    finally:
        signal.signal(signal.SIGINT, before)


# -- the job -------------------------------------------------------------------------------------------------------------


def _train(client: Client, spec: JobSpec, shown: _Progress) -> Update:
    """Submit the job and show it until it is done; a job that this process leaves behind is cancelled."""
    shown.say("Uploading the data and creating the job with the openai client.")
    id = client.submit(spec)["id"]
    shown.say(f"Job {id}")
    update = None
    try:
        with shown:
            for update in client.watch(id):
                shown.update(update)
    finally:
        if update is None or update.job["status"] not in ("succeeded", "failed", "cancelled"):
            with suppress(Exception):  # the service may be what failed
                client.openai.fine_tuning.jobs.cancel(id)
    assert update is not None
    if update.job["status"] != "succeeded":
        error = update.job["error"] or {"message": f"it is {update.job['status']}."}
        raise TuneyardError(f"Job {id} failed: {error['message']}", f"See what it left in {update.detail['run_dir']}.")
    return update


class _Progress:
    """A bar where the terminal can redraw it, else a line every few seconds; events always on lines of their own."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self.stage_seconds: dict[str, float] = {}
        """How long each stage was seen at work, in order."""
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=30), console=out, transient=True)
        self._task = self._bar.add_task("waiting", total=None)
        self._looked = time.monotonic()
        self._printed = ("", 0.0)

    def __enter__(self) -> _Progress:
        if self.out.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self.out.print(escape(line), soft_wrap=True)

    def update(self, update: Update) -> None:
        for event in update.events:
            if event["type"] == "message":
                self.say(f"  {event['message']}")
        now = time.monotonic()
        stage = update.detail["stage"] or "queue"
        self.stage_seconds[stage] = round(self.stage_seconds.get(stage, 0.0) + now - self._looked, 1)
        self._looked = now
        numbers = (update.detail["progress"] or {}).get("data") or {}
        line = report.progress_line(stage, numbers)
        if self.out.is_terminal:
            self._bar.update(self._task, description=escape(line), total=numbers.get("total"), completed=numbers.get("done", 0))
        elif self._printed[0] != line and (self._printed[0].split(" ")[0] != stage or now - self._printed[1] >= LINE_S):
            self.say(line)
            self._printed = (line, now)


# -- results -------------------------------------------------------------------------------------------------------------


def _show_results(run: RunDir, job: Update, out: Console) -> dict[str, Any]:
    """Tables, curves and places of a finished run; returns what the report file says about it."""
    steps, trained = run.steps(), run.read("train.json", TrainRecord)
    model, evaluation = run.read("model.json", ModelRecord), run.read("evaluation.json", EvaluationRecord)
    if trained is None or model is None or evaluation is None:
        message = f"Job {job.job['id']} succeeded, but has no evaluation."
        raise TuneyardError(message, f"See its events: tuneyard events {job.job['id']}")
    for task in evaluation.tasks:
        out.print()
        out.print(report.comparison(task))
        out.print()
        out.print(report.samples(task))
    out.print("\nLoss")
    out.print(escape(report.curve_text(steps)), soft_wrap=True)
    image = run.path("loss.png")
    report.curve_image(steps, image, job.job["fine_tuned_model"])
    adapter = model.adapter
    assert adapter is not None  # the demo's job trains one
    folder = run.path(model.merged or adapter)
    tokens_per_s = trained.trained_tokens / trained.seconds if trained.seconds else 0.0
    out.print(f"Trained  {trained.trained_tokens:,} tokens in {report.duration(trained.seconds)} ({tokens_per_s:,.0f} tokens/s)")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for name, value in (("Model", job.job["fine_tuned_model"]), ("Weights", f"{folder} ({report.size(weights)})"), ("Image", image)):
        out.print(f"{name:<8} {value}", soft_wrap=True)
    return {
        "job": job.job["id"],
        "model": job.job["fine_tuned_model"],
        "base": model.base,
        "weights": str(folder),
        "adapter": str(run.path(adapter)),
        "loss_image": str(image),
        "trained_tokens": trained.trained_tokens,
        "train_seconds": trained.seconds,
        "losses": [{"step": s.step, "train": s.train_loss, "valid": s.valid_loss} for s in steps],
        "evaluation": evaluation.model_dump(mode="json"),
    }


def _call_model(home: Path, client: Client, job: Update, out: Console) -> dict[str, Any]:
    """Print the four lines that call the model, run just those, and print the answer."""
    first = json.loads((JOB.parent / "train.jsonl").read_text(encoding="utf-8").split("\n", 1)[0])
    messages = [first["messages"][0], {"role": "user", "content": REQUEST}]
    lines = report.python_lines(str(client.openai.base_url).rstrip("/"), home / "key", job.job["fine_tuned_model"], messages)
    out.print("\nCall it from Python:\n")
    for line in lines:
        out.print(escape(f"    {line}"), soft_wrap=True)
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        cause = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Unavailable(f"The tuned model did not answer: {cause}", f"See {home / 'service.log'}.")
    out.print(escape(f"\n    {done.stdout.strip()}"), soft_wrap=True)
    return {"python": lines, "answer": done.stdout.strip()}


class _PeakMemory:
    """Samples the memory of this process, its descendants and the home's Ray, which has a session of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.peak = 0
        self.how = "proportional set size" if sys.platform == "linux" else "resident, shared pages counted more than once"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(MEMORY_S):
            me = psutil.Process()
            processes = [me, *me.children(recursive=True)]
            with suppress(FileNotFoundError, ValueError, TypeError):  # no Ray yet, or none any more
                processes += local.LocalHead(**json.loads((self.home / local.RECORD).read_text(encoding="utf-8"))).members()
            self.peak = max(self.peak, sum(map(_memory, {process.pid: process for process in processes}.values())))


def _memory(process: psutil.Process) -> int:
    """Bytes of one process; a page that n processes share counts 1/n where the system tells."""
    with suppress(psutil.Error):
        info = process.memory_full_info()
        return getattr(info, "pss", info.rss)
    return 0
