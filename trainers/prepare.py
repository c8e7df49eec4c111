"""The prepare stage: sources -> conversations -> ids and weights -> proof -> token store and data report. Never holds a GPU.

The work on one chunk of a file (`examine`) is pure and the same everywhere; the executor only decides where chunks are
worked on. Results come back in file order, so the store's bytes and the first error do not depend on the executor.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import tokenizers

from trainers import errors
from trainers.chat import MASK_VERSION, Chat
from trainers.errors import DataError, UserError
from trainers.proof import prove
from trainers.records import DataReport, PrepareRecord, RunDir, SourceReport, SplitReport
from trainers.sources import NORMALISER_VERSION, Chunk, Conversation, Inspection, inspect, read
from trainers.spec import JobSpec
from trainers.store import SCHEMA, STORE_VERSION, Row, StoreWriter, encode_runs, is_store

SPLIT_SEED = 0  # of the hash that chooses validation examples; a job's own seed must not change what it is measured on
_ALL = 2**64
_TABLE_ROWS = 4096
TOO_LONG = "longer than max_length"


@dataclass(frozen=True)
class Rules:
    """All that decides what becomes of a conversation."""

    train_on: str
    slice_by: str | None
    max_length: int
    overlength: str


class Outcome(NamedTuple):
    """What became of one example: a row, a reason for leaving it out, or an error that stops the job."""

    source: int
    """Index among the job's sources, train before validation."""
    row: Row | None = None
    digest: int = 0
    """64 bits of a hash of the messages."""
    dropped: str = ""
    error: tuple[str, str, str] | None = None
    """Class name, message, remedy."""


@dataclass
class Tally:
    """Counts that become the data report."""

    kept: Counter[int] = field(default_factory=Counter)
    dropped: dict[int, Counter[str]] = field(default_factory=dict)
    lengths: dict[str, array[int]] = field(default_factory=lambda: {"train": array("i"), "validation": array("i")})
    supervised: Counter[str] = field(default_factory=Counter)
    slices: dict[str, Counter[str]] = field(default_factory=lambda: {"train": Counter(), "validation": Counter()})
    lowest: int = _ALL
    """Smallest and largest digest of the training sources' examples."""
    highest: int = 0


def prepare(
    spec: JobSpec, model_dir: Path, stores: Path, run: RunDir, *, executor: Literal["local", "ray"], chunk_bytes: int = 4 * 2**20
) -> PrepareRecord:
    """Write the token store of `spec.data` under `stores`/{key}, and `data_report.json` and `prepare.json` into the run directory.

    The same data prepared before, by any job, is a cache hit. "ray" works on chunks as a Ray Data pipeline (CPUs only), "local"
    in this process. Raises DataError for the first bad row in file order, TemplateError where the model's template cannot be used.
    """
    done = run.read("prepare.json", PrepareRecord)
    if done is not None and is_store(Path(done.store)):
        return done
    begun = time.monotonic()
    chat = Chat.load(model_dir)
    rules = Rules(spec.data.train_on, spec.data.slice_by, spec.model.max_length, spec.model.overlength)
    train = spec.data.train
    validation = spec.data.validation if isinstance(spec.data.validation, list) else []
    inspected = [inspect(source, chunk_bytes) for source in [*train, *validation]]
    key = store_key(spec, chat, inspected)
    folder = Path(stores) / key
    cached = is_store(folder)
    if not cached:
        work = _on_ray if executor == "ray" else _in_process
        chunks = [(index, chunk) for index, source in enumerate(inspected) for chunk in source.chunks]
        _build(folder, lambda: work(chat, rules, chunks), spec, chat, inspected, run)

    report = DataReport.model_validate_json((folder / "data_report.json").read_bytes())
    for mine, source in zip(report.sources, inspected, strict=True):
        mine.name = source.name  # a cached store may have read the same bytes under another name
    run.write("data_report.json", report)
    record = PrepareRecord(store=str(folder), key=key, cached=cached, seconds=time.monotonic() - begun)
    run.write("prepare.json", record)
    _tell(run, report, cached)
    return record


def store_key(spec: JobSpec, chat: Chat, inspected: list[Inspection]) -> str:
    """The store's content address: everything that ids, weights, order and split depend on, and nothing else (no path, no name)."""
    num_train = len(spec.data.train)
    files = [{"format": source.format, "sha256": source.sha256} for source in inspected]
    parts = {
        "versions": [STORE_VERSION, MASK_VERSION, NORMALISER_VERSION, tokenizers.__version__],
        "train": files[:num_train],
        "validation": files[num_train:] if isinstance(spec.data.validation, list) else [spec.data.validation, SPLIT_SEED],
        "train_on": spec.data.train_on,
        "slice_by": spec.data.slice_by,
        "max_length": spec.model.max_length,
        "overlength": spec.model.overlength,
        "template": chat.template_sha256,
        "tokenizer": chat.tokenizer_sha256,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def examine(chat: Chat, rules: Rules, source: int, chunk: Chunk) -> Iterator[Outcome]:
    """What becomes of each example of a chunk, in order; an error is the last outcome."""
    try:
        for conversation in read(chunk, rules.slice_by):
            yield _examine_one(chat, rules, source, conversation)
    except UserError as error:  # travels as a value, so that the first one in file order is the one that is raised
        yield Outcome(source, error=(type(error).__name__, error.message, error.remedy))


def _examine_one(chat: Chat, rules: Rules, source: int, conversation: Conversation) -> Outcome:
    where, messages = conversation["id"], conversation["messages"]
    try:
        example = chat.example(messages, rules.train_on)
    except UserError as error:
        raise type(error)(f"{where}: {error.message}", error.remedy) from None
    if len(example.ids) > rules.max_length:
        if rules.overlength == "drop":
            return Outcome(source, dropped=TOO_LONG)
        raise DataError(
            f"{where}: the example has {len(example.ids):,} tokens, more than model.max_length = {rules.max_length:,}.",
            "Raise model.max_length, shorten the example, or set model.overlength to drop.",
        )
    prove(chat, messages, example, rules.train_on, where)
    weights = np.array(example.weights, np.float32)
    supervised = int(np.count_nonzero(weights))
    row = Row(np.array(example.ids, np.int32), *encode_runs(weights), supervised, where, conversation["slice"])
    return Outcome(source, row, _digest(messages))


def _digest(messages: list[dict[str, Any]]) -> int:
    text = json.dumps([SPLIT_SEED, [[m["role"], m["content"]] for m in messages]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# -- outcomes to a store -------------------------------------------------------------------------------------------------


def _build(
    folder: Path, outcomes: Callable[[], Iterable[Outcome]], spec: JobSpec, chat: Chat, inspected: list[Inspection], run: RunDir
) -> None:
    """Write the store, or raise the first error and leave nothing behind."""
    fraction = spec.data.validation if isinstance(spec.data.validation, float) else 0.0
    limit = int(fraction * _ALL)  # an example is held out when its digest is below this
    total = sum(source.rows for source in inspected)
    while True:
        writer = StoreWriter(folder)
        try:
            tally = _collect(outcomes(), writer, limit, len(spec.data.train), run, total)
            balanced = _balance(limit, tally) if fraction else limit
            if balanced == limit:
                _check(tally, spec, inspected)
                writer.commit(_report(tally, chat, inspected).model_dump_json(exclude={"time", "attempt"}))
                return
            limit = balanced  # rare, and only with few examples: make the pass again
        finally:
            writer.abandon()


def _balance(limit: int, tally: Tally) -> int:
    """The limit that leaves an example on each side, where chance put all on one. Equal examples stay together."""
    if tally.lowest >= tally.highest:  # copies of one example at most: nothing can be held out
        return min(limit, tally.lowest)
    return min(max(limit, tally.lowest + 1), tally.highest)


def _collect(outcomes: Iterable[Outcome], writer: StoreWriter, limit: int, num_train: int, run: RunDir, total: int) -> Tally:
    tally = Tally()
    run.progress("prepare", done=0, total=total)
    told = time.monotonic()
    for done, outcome in enumerate(outcomes, 1):
        if outcome.error is not None:
            name, message, remedy = outcome.error
            raise getattr(errors, name)(message, remedy, "training_file" if outcome.source < num_train else "validation_file")
        if time.monotonic() - told > 1:
            told = time.monotonic()
            run.progress("prepare", done=done, total=max(done, total))
        row = outcome.row
        if row is None:
            tally.dropped.setdefault(outcome.source, Counter())[outcome.dropped] += 1
            continue
        split = "validation" if outcome.source >= num_train or outcome.digest < limit else "train"
        if outcome.source < num_train:
            tally.lowest, tally.highest = min(tally.lowest, outcome.digest), max(tally.highest, outcome.digest)
        writer.append(split, row)
        tally.kept[outcome.source] += 1
        tally.lengths[split].append(len(row.input_ids))
        tally.supervised[split] += row.supervised
        if row.slice is not None:
            tally.slices[split][row.slice] += 1
    return tally


def _check(tally: Tally, spec: JobSpec, inspected: list[Inspection]) -> None:
    if not tally.lengths["train"]:
        reasons = sum((tally.dropped.get(i, Counter()) for i in range(len(spec.data.train))), Counter())
        why = "; ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        names = ", ".join(source.name for source in inspected[: len(spec.data.train)])
        raise DataError(
            f"{names}: no example is left to train on ({why}).", "Raise model.max_length, or add shorter examples.", "training_file"
        )
    if spec.data.slice_by and not any(tally.slices.values()):
        raise DataError(
            f"No example has a column `{spec.data.slice_by}` to slice by.",
            "Name a column of the data, or leave slice_by out.",
            "data.slice_by",
        )


def _report(tally: Tally, chat: Chat, inspected: list[Inspection]) -> DataReport:
    sources = []
    for i, source in enumerate(inspected):
        dropped = dict(sorted(tally.dropped.get(i, Counter()).items()))
        sources.append(
            SourceReport(
                name=source.name,
                url=source.chunks[0].path if source.chunks else "",
                format=source.format,
                bytes=source.bytes,
                sha256=source.sha256,
                read=tally.kept[i] + sum(dropped.values()),
                kept=tally.kept[i],
                dropped=dropped,
                examples=tally.kept[i],
            )
        )
    splits = {}
    for split in ("train", "validation"):
        lengths = np.array(tally.lengths[split], np.int32)
        p50, p95, longest = np.percentile(lengths, [50, 95, 100], method="inverted_cdf").tolist() if len(lengths) else (0, 0, 0)
        splits[split] = SplitReport(
            examples=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            supervised_tokens=tally.supervised[split],
            length_p50=p50,
            length_p95=p95,
            length_max=longest,
            slices=dict(sorted(tally.slices[split].items())),
        )
    return DataReport(sources=sources, template_sha256=chat.template_sha256, tokenizer_sha256=chat.tokenizer_sha256, **splits)


def _tell(run: RunDir, report: DataReport, cached: bool) -> None:
    train, validation = report.train, report.validation
    run.progress("prepare", done=sum(s.read for s in report.sources), total=sum(s.read for s in report.sources))
    run.event(
        f"{'Found the prepared' if cached else 'Prepared'} data: {train.examples:,} training and {validation.examples:,} validation "
        f"examples, {train.tokens:,} training tokens, {train.supervised_tokens:,} of them supervised.",
        cached=cached,
    )
    for source in report.sources:
        for reason, count in source.dropped.items():
            run.event(f"{source.name}: {count:,} of {source.read:,} examples left out: {reason}.", level="warn", dropped={reason: count})


# -- executors -----------------------------------------------------------------------------------------------------------


def _in_process(chat: Chat, rules: Rules, chunks: list[tuple[int, Chunk]]) -> Iterator[Outcome]:
    for source, chunk in chunks:
        yield from examine(chat, rules, source, chunk)


def _on_ray(chat: Chat, rules: Rules, chunks: list[tuple[int, Chunk]]) -> Iterator[Outcome]:
    """One task for each chunk, on CPUs; tables come back in the chunks' order and memory stays flat."""
    import ray.data

    orders = [{"source": source, "chunk": json.dumps(asdict(chunk))} for source, chunk in chunks]
    dataset = ray.data.from_items(orders, override_num_blocks=len(orders))
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True

    def work(batch: pa.Table) -> Iterator[pa.Table]:
        for order in batch.to_pylist():
            rows: list[Outcome] = []
            for outcome in examine(chat, rules, order["source"], Chunk(**json.loads(order["chunk"]))):
                rows.append(outcome)
                if len(rows) == _TABLE_ROWS:
                    yield _to_table(rows)
                    rows = []
            yield _to_table(rows)

    for table in dataset.map_batches(work, batch_format="pyarrow", batch_size=None).iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from _from_table(table)


_OUTCOMES = pa.schema(
    [
        ("source", pa.int32()),
        ("digest", pa.uint64()),
        ("dropped", pa.string()),
        ("error", pa.list_(pa.string())),
        ("kept", pa.bool_()),
        *(SCHEMA.field(name) for name in Row._fields),
    ]
)


def _to_table(outcomes: list[Outcome]) -> pa.Table:
    rows = [{**o._asdict(), "kept": o.row is not None, **(o.row._asdict() if o.row else dict.fromkeys(Row._fields))} for o in outcomes]
    return pa.Table.from_pylist(rows, schema=_OUTCOMES)


def _from_table(table: pa.Table) -> Iterator[Outcome]:
    for batch in table.to_batches():
        columns = {name: batch.column(name) for name in _OUTCOMES.names}
        for i in range(batch.num_rows):
            row = None
            if columns["kept"][i].as_py():
                # Copied, so that no row keeps a whole block of the object store alive.
                lists = [columns[name][i].values.to_numpy().copy() for name in ("input_ids", "run_weights", "run_lengths")]
                row = Row(*lists, *(columns[name][i].as_py() for name in ("supervised", "id", "slice")))
            error = columns["error"][i].as_py()
            yield Outcome(
                columns["source"][i].as_py(), row, columns["digest"][i].as_py(), columns["dropped"][i].as_py(), error and tuple(error)
            )
