"""What a run leaves on disk, and the only way to write it.

Files are the contract between the stages, the runner and the reader. Every record is written whole under a temporary
name and renamed, so it exists or it does not; lists (events, metrics) are closed JSONL segments, because objects in a
bucket cannot be appended to. Readers ignore keys they do not know. A writer re-reads the run's lease before each write
and stops (`Fenced`) once a later attempt holds it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from trainers.errors import Fenced

SCHEMA_VERSION = 1
TEMPLATE_FILE = "chat_template.jinja"
"""The chat template that a run's examples were rendered with: in the run directory, in every adapter's folder and in the merged model."""


class Record(BaseModel):
    """Base of all records. Unknown keys are kept, so that an older reader passes on what a newer writer said."""

    model_config = ConfigDict(extra="allow")

    schema_version: int = SCHEMA_VERSION
    attempt: int = 0
    """The attempt that wrote it; filled in by RunDir."""
    time: float = Field(default_factory=time.time)
    """Seconds since the epoch."""


R = TypeVar("R", bound=Record)


class Lease(Record):
    """Which attempt may write. Written by the runner before it starts an attempt."""


class Event(Record):
    """Something a job's owner should know, in one line."""

    level: Literal["info", "warn", "error"] = "info"
    message: str
    data: dict[str, Any] | None = None
    id: str = ""
    """`{attempt}-{writer}-{segment}-{line}`; filled in when read."""


class StageProgress(Event):
    """How far a stage has come: shown live, replaced by the next one. `data` of the event holds the numbers."""


class StepRecord(Record):
    """One optimizer step."""

    step: int
    """Counts from 1: the number of optimizer steps made."""
    num_steps: int
    epoch: float
    """Passes over the data made so far, fractional."""
    train_loss: float
    """Weighted mean negative log-likelihood per supervised token, in nats."""
    train_accuracy: float
    """Share of supervised tokens whose most likely prediction is right."""
    learning_rate: float
    grad_norm: float
    """Global norm before clipping."""
    tokens: int
    """Tokens of this step, over all workers."""
    supervised_tokens: int
    seconds: float
    """Wall time of this step."""
    skipped: bool = False
    """Its gradient was not finite or a spike, and the parameters stayed as they were. Where the loss is not finite either, `train_loss`
    repeats the loss before it and `grad_norm` is 0: records hold numbers only."""
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    valid_slices: dict[str, dict[str, float]] = {}
    """Where examples are sliced: slice -> {"loss", "accuracy", "supervised_tokens"} over its validation examples."""


class Case(BaseModel):
    """One example of something the data report counts."""

    where: str
    """`file:line`."""
    text: str
    """What was found there, at most about 200 characters."""


class SourceReport(BaseModel):
    """One source's part of the data report. read == kept + sum(dropped), in rows of the source."""

    name: str
    url: str
    """Where it was read from."""
    format: str
    bytes: int
    """As stored (compressed, if it is)."""
    sha256: str
    licence: str | None = None
    weight: float = 1.0
    read: int
    kept: int
    dropped: dict[str, int] = {}
    """Reason -> rows left out."""
    examples: int
    """Examples made of the kept rows: more where long conversations were split or rows are repeated, fewer where they were thinned out."""


class Finding(BaseModel):
    """One thing that preparation looked for or did, over all sources."""

    step: str
    """What: `duplicates`, `truncate_prompt`, `refused`, ..."""
    action: str
    """What was done about it: `report`, `drop`, `mask`, `refuse`, `repeat`, `shorten`, `split`."""
    rows: int
    """How many rows it concerned."""
    detail: dict[str, float] = {}
    """Counts by kind, where the step tells kinds apart."""
    cases: list[Case] = []
    """The first few."""


class SplitReport(BaseModel):
    """Counts of one split (train or validation) of the token store."""

    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    length_p50: int = 0
    length_p95: int = 0
    length_max: int = 0
    lengths: list[tuple[int, int]] = []
    """Histogram: (longest length of the bin in tokens, examples in it), shortest first; empty bins included."""
    slices: dict[str, int] = {}


class DataReport(Record):
    """What was read, kept and left out, and why: enough to rebuild the token store bit for bit from the same bytes."""

    sources: list[SourceReport]
    findings: list[Finding] = []
    train: SplitReport
    validation: SplitReport
    recipe: dict[str, Any] = {}
    """Everything else that the store's content depends on: versions, template, max_length, masking, curation, split."""
    requested_by: str | None = None
    """Who asked, as the service knows them."""
    template_sha256: str
    tokenizer_sha256: str
    tokenizer: str = "hf"
    """What turned text into tokens: `hf`, or `fastokens` where it proved equal on a sample of this very data."""


class PrepareRecord(Record):
    """The prepare stage is done: the token store is whole and proven."""

    store: str
    """Folder of the token store."""
    key: str
    """The store's content address."""
    cached: bool
    """An earlier job had prepared the same data."""
    seconds: float


class SampleRecord(Record):
    """A validation example as the model answered it after `step`, in token ids: no tokenizer runs where training does."""

    step: int
    example: int
    """Its number in the validation split."""
    prompt_ids: list[int]
    answer_ids: list[int]
    """Greedy; cut at the spec's `validate.sample_tokens`."""
    reference_ids: list[int]


class CheckpointRecord(Record):
    """A checkpoint's MANIFEST.json. A folder without one, or with one its files do not match, is no checkpoint."""

    step: int
    world_size: int = 1
    """Workers that wrote it; any number can go on from it."""
    files: dict[str, dict[str, int | str]]
    """File name -> {"bytes": size, "sha256": hex digest}."""
    train_loss: float
    train_accuracy: float
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    sha256: str = ""
    """Of the manifest itself, with zeros in this place, which is its last."""


class TrainRecord(Record):
    """The train stage is done (or was stopped, or failed for a reason that its owner must mend)."""

    status: Literal["finished", "stopped", "failed"]
    step: int = 0
    num_steps: int = 0
    trained_tokens: int = 0
    """Tokens processed over all steps and epochs."""
    best_step: int | None = None
    """Step of the chosen checkpoint: lowest validation loss, else the last."""
    seconds: float = 0.0
    error: dict[str, Any] | None = None
    """`{"code", "message", "param"}` when failed."""


class TimingRecord(Record):
    """From asking for the job to the end of its first step (`timing.json`), of the newest start of the training workers."""

    phases: dict[str, float]
    """Phase -> seconds it took, in order: `queue`, `driver`, ..., `first step`."""


class MachineRecord(Record):
    """What the training leader runs on (`machine.json`)."""

    device: str
    """The GPU's name, or `CPU`."""
    memory_bytes: int
    """Of that GPU; on a CPU the machine's, divided by the workers there."""


class ModelRecord(Record):
    """The merge stage is done: what the tuned model is and where its parts lie, relative to the run directory."""

    base: str
    """Catalogue id of the base model."""
    adapter: str | None
    """PEFT folder of the chosen step; None where every weight was trained."""
    merged: str | None
    """Folder of the whole tuned model; None when the spec asked for none."""
    served: Literal["adapter", "merged"] = "adapter"
    """What answers: the adapter beside others on the shared base, or the whole model on its own, where no adapter says it exactly."""
    step: int
    exports: dict[str, str] = {}
    """Format -> file, relative to the run directory."""
    kl: float | None = None
    """KL divergence of merged from base + adapter, nats per token, over the probe prompts."""
    effect: float | None = None
    """The same for the bare base: what the adapter itself does."""
    max_logit_difference: float | None = None
    """Largest difference of any logit, merged against base + adapter."""


class DeployRecord(Record):
    """The deploy stage is done: the name answered."""

    model: str
    """The name that answers at the service's base_url."""
    first_answer_s: float
    """Seconds from asking to the first answer."""
    replayed: int = 0
    """Held-out conversations whose prompts were compared id for id, and their answers by log-probability."""
    compared_tokens: int = 0
    mean_difference: float | None = None
    """Mean distance of the served model's log-probabilities of those tokens from the trained model's, in nats."""
    max_difference: float | None = None
    tolerance: tuple[float, float] | None = None
    """What the two may be at most."""


Pair = tuple[float, float]
"""An interval at 95%."""


class Difference(BaseModel):
    """Tuned against base on the same cases, in one number."""

    difference: float
    """Mean of tuned - base."""
    low: float
    high: float
    p: float
    """How often chance alone gives such a difference (exact McNemar for rates, else a permutation test)."""
    better: int
    """Cases on which tuned scored higher."""
    worse: int


class FaultCase(BaseModel):
    """One answer with a fault."""

    id: str
    prompt: str
    answer: str
    detail: str


class Fault(BaseModel):
    """One kind of fault in answers: how often, and the tuned model's worst cases."""

    kind: str
    told: str
    """What it is, in a sentence."""
    base: int
    tuned: int
    p: float
    """Two-sided: how often chance alone gives such a difference of counts (exact McNemar)."""
    cases: list[FaultCase] = []


class TaskResult(BaseModel):
    """One task: base against tuned on the same examples."""

    name: str
    metric: str
    examples: int
    base: dict[str, float]
    """Metric name -> mean, for example {"exact_match": 0.12, "valid_json": 0.4}."""
    tuned: dict[str, float]
    failed_requests: dict[str, int] = {}
    """Model (`base`, `tuned`) -> requests that got no answer after all tries; they count as wrong."""
    slices: dict[str, dict[str, Any]] = {}
    """Slice -> {"examples", "base", "tuned", "intervals": {model -> Pair}, "difference": Difference}; the last two of the deciding one."""
    samples: list[dict[str, str]] = []
    """A few prompts with reference, base and tuned answer."""
    intervals: dict[str, dict[str, Pair]] = {}
    """Model -> metric name -> interval of the mean."""
    differences: dict[str, Difference] = {}
    """Metric name -> tuned against base."""
    faults: list[Fault] = []
    warnings: list[str] = []
    """Where slices differ by more than chance explains, and the like."""


class LossResult(BaseModel):
    """Negative log-likelihood of held-out answers, in nats per supervised token, asked of the served models."""

    source: str
    """Which answers: `validation split`, or the tasks' references."""
    examples: int
    tokens: dict[str, int]
    """Model -> supervised tokens."""
    base: float
    tuned: float
    intervals: dict[str, Pair]
    difference: Pair | None = None
    """Interval of tuned - base; None where the two count tokens differently."""
    slices: dict[str, dict[str, float]] = {}
    """Slice -> {"examples", "base", "tuned"}."""


class JudgeResult(BaseModel):
    """What a model that rates answers says."""

    model: str
    cases: int
    """Cases that were judged."""
    rubric: dict[str, dict[str, Any]] = {}
    """Criterion -> {"examples", "base", "tuned" (means of 1-5), "intervals", "difference"}."""
    wins: int = 0
    """Pairs in which tuned was preferred in both orders."""
    losses: int = 0
    ties: int = 0
    """Pairs with a tie, or whose two orders contradict each other."""
    win_rate: float | None = None
    """(wins + ties / 2) / pairs."""
    win_rate_interval: Pair | None = None
    disagreements: int = 0
    """Pairs judged one way in one order and otherwise in the other; they are among the ties."""
    first_preferred: float | None = None
    """Share of the single verdicts with a winner that chose the answer shown first: 0.5 is no preference for a place."""
    unsupported: Fault | None = None
    """Answers that state what neither the request nor the reference supports."""
    unparsable: int = 0
    """Verdicts that could not be read after all tries; they are left out."""
    failed_requests: int = 0


class KeptRecord(Record):
    """An answer to one request, kept so that a resumed evaluation asks only what is missing."""

    key: str
    """Hash of all that the answer depends on."""
    value: Any


class BenchmarkResult(BaseModel):
    """A task of lm-evaluation-harness on both models."""

    task: str
    group: str | None = None
    """The group of tasks that it is a part of (`mmlu_stem`); None for what was asked for."""
    metric: str
    """As the harness names it, for example `acc,none`."""
    base: float
    tuned: float
    less_is_better: bool = False
    """A perplexity, for example."""
    base_error: float | None = None
    """Standard error, where the harness gives one."""
    tuned_error: float | None = None

    @property
    def gain(self) -> float:
        """By how much the tuned model is better; below zero, it forgot."""
        return self.base - self.tuned if self.less_is_better else self.tuned - self.base


class EvaluationRecord(Record):
    """The evaluate stage is done (`evaluation.json`). Every answer lies beside it, in `answers.jsonl`."""

    tasks: list[TaskResult]
    seconds: float
    base: str = ""
    tuned: str = ""
    """What was compared."""
    loss: LossResult | None = None
    judge: JudgeResult | None = None
    benchmarks: list[BenchmarkResult] = []
    warnings: list[str] = []
    """What was asked for and could not be measured, and why."""


class OutcomeRecord(Record):
    """How an attempt ended (`outcome.json`), written last of all. No outcome after the process is gone = a crash."""

    status: Literal["succeeded", "failed", "stopped"]
    """`stopped`: at a checkpoint, as `control.json` asked; a later attempt goes on from there."""
    error: dict[str, Any] | None = None
    """`{"code", "message", "param"}` when failed: a reason that its owner must mend, never retried."""


class RunDir:
    """One run's folder, seen by one attempt of one writer.

    `writer` names the process (`driver`, `train`) so that two of them never share a segment file.
    A reader leaves attempt and writer out; it then has no right to write.
    """

    def __init__(self, root: str | Path, attempt: int = 0, writer: str = "") -> None:
        self.root = Path(root)
        self.attempt = attempt
        self.writer = writer

    def path(self, *parts: str) -> Path:
        return self.root.joinpath(*parts)

    # -- single records ----------------------------------------------------------------------------------------------

    def check_lease(self) -> None:
        """Raise Fenced if a later attempt may write (a driver whose head died lives on for a minute)."""
        lease = self.read("lease.json", Lease)
        if lease is not None and lease.attempt > self.attempt:
            raise Fenced(
                f"Attempt {self.attempt} of {self.root.name} was replaced by attempt {lease.attempt}.",
                "This process stops without writing.",
            )

    def write(self, name: str, record: R) -> R:
        """Write a record whole, as the last act of what it stands for; returns it as written."""
        self.check_lease()
        record = record.model_copy(update={"attempt": self.attempt})
        write_atomic(self.path(name), record.model_dump_json(indent=2))
        return record

    def read(self, name: str, kind: type[R]) -> R | None:
        """The record of this name, or None where it was not (yet) written."""
        try:
            return kind.model_validate_json(self.path(name).read_bytes())
        except FileNotFoundError:
            return None

    def grant(self) -> None:
        """Take the lease for this attempt (the runner's part, before the attempt starts)."""
        self.write("lease.json", Lease())

    # -- lists in segments -------------------------------------------------------------------------------------------

    def append(self, kind: str, records: list[Any]) -> None:
        """Close one segment of `kind` ("events", "metrics") with these records."""
        if not records:
            return
        self.check_lease()
        folder = self.path(kind)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self.attempt:04d}-{self.writer}-"
        number = 1 + max((int(p.stem.rsplit("-", 1)[1]) for p in folder.glob(f"{stem}*.jsonl")), default=0)
        lines = [r.model_copy(update={"attempt": self.attempt}).model_dump_json(exclude={"id"}) for r in records]
        write_atomic(folder / f"{stem}{number:06d}.jsonl", "\n".join(lines) + "\n")

    def event(self, message: str, level: Literal["info", "warn", "error"] = "info", **data: Any) -> None:
        """Tell the job's owner something, at once."""
        self.append("events", [Event(level=level, message=message, data=data or None)])

    def events(self, after: set[str] = frozenset()) -> Iterator[tuple[str, list[Event]]]:  # type: ignore[assignment]
        """Closed segments not named in `after`: (segment file name, its events), oldest writer first."""
        for name, lines in self._segments("events", after):
            stem = name.removesuffix(".jsonl")
            yield name, [Event.model_validate({**json.loads(line), "id": f"{stem}-{i}"}) for i, line in enumerate(lines)]

    def step_segments(self, after: set[str] = frozenset()) -> Iterator[tuple[str, list[StepRecord]]]:  # type: ignore[assignment]
        """Closed segments of step records not named in `after`: (segment file name, its records), oldest writer first."""
        for name, lines in self._segments("metrics", after):
            yield name, [StepRecord.model_validate_json(line) for line in lines]

    def steps(self) -> list[StepRecord]:
        """Every step's record in order; where a resumed attempt made a step again, the later one counts."""
        by_step = {record.step: record for _, records in self.step_segments() for record in records}
        return [by_step[s] for s in sorted(by_step)]

    def samples(self) -> list[SampleRecord]:
        """Every sampled answer by step and example; where a resumed attempt made a step again, the later one counts."""
        found = {}
        for _, lines in self._segments("samples", set()):
            for sample in map(SampleRecord.model_validate_json, lines):
                found[sample.step, sample.example] = sample
        return [found[key] for key in sorted(found)]

    def kept(self) -> dict[str, Any]:
        """Every answer kept so far, by its request's key."""
        records = (KeptRecord.model_validate_json(line) for _, lines in self._segments("answers", set()) for line in lines)
        return {record.key: record.value for record in records}

    def _segments(self, kind: str, after: set[str]) -> Iterator[tuple[str, list[str]]]:
        for path in sorted(self.path(kind).glob("*.jsonl")):
            if path.name not in after:
                yield path.name, path.read_text(encoding="utf-8").splitlines()

    # -- live progress -----------------------------------------------------------------------------------------------

    def progress(self, stage: str, **numbers: Any) -> None:
        """Replace the one record that says what the run is doing now (`progress.json`)."""
        self.write("progress.json", StageProgress(message=stage, data=numbers))


def rank_log(run: RunDir, rank: int) -> Path:
    """Where one training worker's output goes: all starts of an attempt's workers in one file."""
    return run.path("logs", f"attempt-{run.attempt:04d}-rank-{rank:03d}.log")


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that readers see all of it or the file before it, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    with suppress(OSError):  # some filesystems refuse to sync a folder; the rename itself is still atomic
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_CHECKPOINT = re.compile(r"^step-(\d{6,})-a(\d+)$")


def checkpoint_name(step: int, attempt: int) -> str:
    return f"step-{step:06d}-a{attempt}"


def parse_checkpoint_name(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint folder's name, or None for any other name."""
    match = _CHECKPOINT.match(name)
    return (int(match[1]), int(match[2])) if match else None
