"""The prepare stage: sources -> examined rows -> the choice among them -> token store and data report. Never holds a GPU.

The work on one chunk of a file (`examine`) is pure and the same everywhere; the executor only decides where chunks are worked on.
Rows come back in file order and are spooled to disk; what depends on all rows at once (duplicates, the validation split, mixture and
balance) is decided here from a few columns. So the store's bytes do not depend on executor, workers or chunk size.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa

from trainers import errors
from trainers.chat import MASK_VERSION, Chat
from trainers.curate import CURATE_VERSION, SKETCH_DTYPE, RowChecks, fingerprints, sketch
from trainers.errors import DataError, RowError
from trainers.examine import ROWS, Diverged, Rules, examine
from trainers.personal import mask
from trainers.records import TEMPLATE_FILE, Case, DataReport, Finding, PrepareRecord, RunDir, SourceReport, SplitReport, write_atomic
from trainers.select import Found, Rows, Selection, select
from trainers.sources import NORMALISER_VERSION, Chunk, Inspection, conversations, inspect, read
from trainers.spec import JobSpec, Source
from trainers.spool import Spool
from trainers.store import SCHEMA, STORE_VERSION, StoreWriter, is_store
from trainers.tokens import one_core, parity

Executor = Literal["local", "ray"]
Progress = Callable[[int, int], None]
"""Called with (rows examined, rows in all as far as known)."""

_NUM_CASES = 5
_SAMPLE_ROWS = 512  # rows on which the fast tokenizer must agree with the reference before it is used
_WRITE_ROWS = 4096


def prepare(
    spec: JobSpec,
    model_dir: Path,
    stores: Path,
    run: RunDir,
    *,
    executor: Executor,
    chunk_bytes: int = 4 * 2**20,
    requested_by: str | None = None,
) -> PrepareRecord:
    """Write the token store of `spec.data` under `stores`/{key}, and `data_report.json` and `prepare.json` into the run directory.

    The same data prepared before, by any job, is a cache hit; one that was killed goes on from the chunks it had examined. "ray" works
    on chunks as a Ray Data pipeline (CPUs only), "local" in this process. Raises DataError for the first bad row in file order,
    TemplateError where the model's template cannot be used.
    """
    done = run.read("prepare.json", PrepareRecord)
    if done is not None and is_store(Path(done.store)):
        return done
    begun = time.monotonic()
    work = _Work.begin(spec, model_dir, executor, chunk_bytes)
    while True:
        folder = Path(stores) / work.key
        cached = is_store(folder)
        try:
            if not cached:
                _build(work, folder, run)
            break
        except Diverged as error:
            run.event(f"{error.message} The data is prepared again with the tokenizers library.", "warn")
            work = work.with_reference(error.message)

    report = DataReport.model_validate_json((folder / "data_report.json").read_bytes())
    for mine, source, inspected in zip(report.sources, work.sources, work.inspected, strict=True):
        # A cached store may have read the same bytes elsewhere.
        mine.name, mine.url, mine.licence = inspected.name, inspected.url, source.licence
    report.requested_by = requested_by
    run.check_lease()
    write_atomic(run.path(TEMPLATE_FILE), work.chat.template)
    run.write("data_report.json", report)
    record = PrepareRecord(store=str(folder), key=work.key, cached=cached, seconds=time.monotonic() - begun)
    run.write("prepare.json", record)
    _tell(run, report, cached, work.why_not_fast)
    return record


def survey(
    spec: JobSpec, model_dir: Path, scratch: Path, *, executor: Executor = "local", on_progress: Progress = lambda done, total: None
) -> DataReport:
    """The report that `prepare` would write, and more: rows that would stop it are counted as findings ("refused"). Writes no store.

    `scratch` is an empty folder for what does not fit into memory. Raises DataError where a source cannot be read at all.
    """
    work = _Work.begin(spec, model_dir, executor, 4 * 2**20)
    while True:
        try:
            with Spool.open(scratch / work.key, work.chunks) as spool:
                _examine_missing(work, spool, on_progress, tolerant=True)
                gathered = _gather(work, spool)
                return _report(work, spool, gathered)
        except Diverged as error:
            work = work.with_reference(error.message)


class _Work(NamedTuple):
    """A data set to prepare: what, from where, by which rules."""

    spec: JobSpec
    chat: Chat
    rules: Rules
    sources: list[Source]
    """Training sources, then validation sources."""
    inspected: list[Inspection]
    num_train: int
    tests: dict[str, np.ndarray]
    """Prompts (uint64 fingerprints) of each evaluation task, where leakage is looked for."""
    test_sketches: dict[str, np.ndarray]
    """Sketches of each evaluation task, where near-duplicates are looked for too."""
    recipe: dict[str, Any]
    key: str
    executor: Executor
    why_not_fast: str | None

    @classmethod
    def begin(cls, spec: JobSpec, model_dir: Path, executor: Executor, chunk_bytes: int) -> _Work:
        """Inspect every source and choose the tokenizer's backend."""
        data = spec.data
        chat = Chat.load(model_dir, spec.model.template)
        rules = Rules.of(spec)
        RowChecks(data.curate)  # what cannot be checked is refused here and not in every worker
        sources = [*data.train, *(data.validation if isinstance(data.validation, list) else [])]
        inspected = [inspect(source, chunk_bytes) for source in sources]
        why_not = parity(chat.tokenizer_json, _sample(inspected))
        if why_not is None:
            chat = chat.with_backend("fastokens")
        tests, test_sketches = _test_rows(spec)
        recipe = _recipe(spec, chat, sources, inspected, tests)
        return cls(spec, chat, rules, sources, inspected, len(data.train), tests, test_sketches, recipe, _key(recipe), executor, why_not)

    def with_reference(self, why: str) -> _Work:
        chat = self.chat.with_backend("hf")
        recipe = _recipe(self.spec, chat, self.sources, self.inspected, self.tests)
        return self._replace(chat=chat, recipe=recipe, key=_key(recipe), why_not_fast=why)

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for source in self.inspected for chunk in source.chunks]

    @property
    def source_of(self) -> list[int]:
        """Number of the source that each chunk belongs to."""
        return [number for number, source in enumerate(self.inspected) for _ in source.chunks]


def _sample(inspected: list[Inspection]) -> list[str]:
    """Texts from all over the data set."""
    chunks = [chunk for source in inspected for chunk in source.chunks]
    chosen = chunks[:: max(1, len(chunks) // 16)][:16]
    texts = []
    for chunk in chosen:
        for row in islice(read(chunk), max(1, _SAMPLE_ROWS // len(chosen))):
            if not isinstance(row, RowError):
                texts += [message["content"] for message in row["messages"]]
    return texts


def _test_rows(spec: JobSpec) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(prompts, sketches) of each evaluation task; nothing where nobody asks."""
    prompts: dict[str, np.ndarray] = {}
    sketches: dict[str, np.ndarray] = {}
    for task in spec.evaluate.tasks if spec.data.curate.leakage != "off" else ():
        rows = list(conversations(Source(path=task.path, name=task.shown)))
        prompts[task.shown] = np.array([fingerprints(row)[1] for row in rows], np.uint64)
        if spec.data.curate.near_duplicates is not None:
            sketches[task.shown] = np.stack([sketch(row) for row in rows])
    return prompts, sketches


def _recipe(spec: JobSpec, chat: Chat, sources: list[Source], inspected: list[Inspection], tests: dict[str, np.ndarray]) -> dict[str, Any]:
    """Everything that ids, weights, order and split depend on, and nothing else (no path, no name)."""
    num_train = len(spec.data.train)
    files = [
        {"format": seen.format, "sha256": seen.sha256, "columns": source.columns, "weight": source.weight}
        for source, seen in zip(sources, inspected, strict=True)
    ]
    return {
        "versions": {
            "store": STORE_VERSION,
            "mask": MASK_VERSION,
            "normaliser": NORMALISER_VERSION,
            "curation": CURATE_VERSION,
            **{name: importlib.metadata.version(name) for name in _libraries(spec, chat)},
        },
        "train": files[:num_train],
        "validation": files[num_train:] if isinstance(spec.data.validation, list) else spec.data.validation,
        "tests": {name: hashlib.sha256(prompts.tobytes()).hexdigest() for name, prompts in tests.items()},
        "train_on": spec.data.train_on,
        "reasoning": spec.data.reasoning,
        "slice_by": spec.data.slice_by,
        "curate": spec.data.curate.model_dump(mode="json"),
        "max_length": spec.model.max_length,
        "overlength": spec.model.overlength,
        "template": chat.template_sha256,
        "tokenizer": chat.tokenizer_sha256,
    }


def _libraries(spec: JobSpec, chat: Chat) -> list[str]:
    """The libraries whose every release may decide otherwise."""
    curate = spec.data.curate
    used = {"rensa": curate.near_duplicates is not None, "py3langid": bool(curate.languages), "ftfy": curate.junk != "off"}
    return ["tokenizers" if chat.backend == "hf" else chat.backend, *(name for name, needed in used.items() if needed)]


def _key(recipe: dict[str, Any]) -> str:
    """The store's content address."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]


# -- rows to a store -----------------------------------------------------------------------------------------------------


def _build(work: _Work, folder: Path, run: RunDir) -> None:
    """Write the store, or raise the first error and leave nothing behind; killed, leave the examined chunks for the next try."""
    told = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > 1:
            told = time.monotonic()
            run.progress("prepare", done=done, total=max(done, total))

    if work.executor == "ray":
        _warm_up(work.chat)
    with Spool.open(folder.parent / f".{folder.name}.parts.tmp", work.chunks) as spool:
        if is_store(folder):  # another job made it while we waited
            spool.remove()
            return
        try:
            _examine_missing(work, spool, progress, tolerant=False)
            gathered = _gather(work, spool)
            _check(work, spool, gathered)
            writer = StoreWriter(folder)
            try:
                _write(writer, "train", spool, gathered.selection.train)
                _write(writer, "validation", spool, gathered.selection.validation)
                writer.commit(_report(work, spool, gathered).model_dump_json(exclude={"time", "attempt"}))
            finally:
                writer.abandon()
        except errors.UserError:
            spool.remove()  # the same rows would fail again
            raise
        spool.remove()


def _examine_missing(work: _Work, spool: Spool, progress: Progress, tolerant: bool) -> None:
    """Examine the chunks whose part is not there yet; unless tolerant, raise the first error in file order."""
    missing = spool.missing()
    chunks, source_of = work.chunks, work.source_of
    total = sum(source.rows for source in work.inspected)
    done = 0
    progress(done, total)
    tables = (_on_ray if work.executor == "ray" else _in_process)(work.chat, work.rules, [(i, chunks[i]) for i in missing])

    def checked() -> Iterator[tuple[int, pa.Table]]:
        for part, table in tables:
            _raise_first_error(table, source_of[part] < work.num_train, tolerant)
            yield part, table

    with closing(tables):  # an error must stop the other tasks now, not when the garbage is collected
        for table in spool.write(checked()):
            done += table.num_rows
            progress(done, total)


def _raise_first_error(table: pa.Table, is_train: bool, tolerant: bool) -> None:
    errors_of = table.column("error")
    if errors_of.null_count == len(errors_of):
        return
    for error in errors_of.to_pylist():
        if error is not None and (not tolerant or error[0] == Diverged.__name__):
            name, message, remedy, _ = error
            kind = Diverged if name == Diverged.__name__ else errors.TemplateError if name == "TemplateError" else DataError
            raise kind(message, remedy, "training_file" if is_train else "validation_file")


@dataclass
class _Seen:
    """One thing found in rows on their own account."""

    step: str
    action: str
    kinds: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    cases: list[tuple[int, str]] = field(default_factory=list)
    """The first few, as (row, text)."""
    _last: int = -1

    def add(self, kind: str, row: int, text: str) -> None:
        self.kinds[kind] += 1
        if row != self._last:  # a row may hold several kinds
            self.rows, self._last = self.rows + 1, row
            if len(self.cases) < _NUM_CASES:
                self.cases.append((row, text))


class _Gathered(NamedTuple):
    """What the choice was made from, and the choice."""

    selection: Selection
    source: np.ndarray
    """int32 [N]: source of each examined row."""
    dropped: dict[str, np.ndarray]
    """Reason -> rows left out on their own account."""
    seen: list[_Seen]
    """What was found in single rows."""
    num_examples: np.ndarray
    """int32 [N]."""
    lengths: np.ndarray
    supervised: np.ndarray
    """int32 [E]: of every example, in the rows' order."""
    slices: np.ndarray
    """int32 [N]: number of each row's slice, or -1."""
    slice_names: list[str]


def _gather(work: _Work, spool: Spool) -> _Gathered:
    """Read the few columns that decide, and choose."""
    num_rows = spool.count()
    source = np.zeros(num_rows, np.int32)
    digest, prompt = np.zeros(num_rows, np.uint64), np.zeros(num_rows, np.uint64)
    alive = np.ones(num_rows, bool)
    num_examples = np.zeros(num_rows, np.int32)
    classes, slices = np.full(num_rows, -1, np.int32), np.full(num_rows, -1, np.int32)
    class_names: dict[str, int] = {}
    slice_names: dict[str, int] = {}
    lengths, supervised, sketches = [], [], []
    dropped: dict[str, list[int]] = {}
    seen: dict[tuple[str, str], _Seen] = {}

    def find(step: str, action: str, kind: str, row: int, text: str) -> None:
        seen.setdefault((step, action), _Seen(step, action)).add(kind, row, text)

    at = 0
    for part, source_number in enumerate(work.source_of):
        for batch in spool.part(part):
            here = slice(at, at + batch.num_rows)
            source[here] = source_number
            digest[here], prompt[here] = batch.column("digest").to_numpy(), batch.column("prompt").to_numpy()
            num_examples[here] = batch.column("examples").value_lengths().to_numpy()
            examples = batch.column("examples").flatten()
            lengths.append(examples.field("length").to_numpy())
            supervised.append(examples.field("supervised").to_numpy())
            _encode(batch.column("class"), class_names, classes[here])
            _encode(batch.column("slice"), slice_names, slices[here])
            if work.rules.curate.near_duplicates is not None:
                sketches.append(batch.column("sketch"))
            for name in ("dropped", "error", "notes"):
                column = batch.column(name)
                if column.null_count == len(column):
                    continue
                for row, value in enumerate(column.to_pylist(), at):
                    if value is None:
                        continue
                    if name == "dropped":
                        dropped.setdefault(value, []).append(row)
                        alive[row] = False
                    elif name == "error":
                        find("refused", "refuse", value[3], row, f"{value[1]} {value[2]}")
                        dropped.setdefault(f"refused: {value[3]}", []).append(row)
                        alive[row] = False
                    else:
                        for note in value:
                            find(note["step"], note["action"], note["kind"], row, note["text"])
            at += batch.num_rows

    chosen = np.flatnonzero(alive)
    selection = select(
        Rows(
            source=source[chosen],
            held_out=source[chosen] >= work.num_train,
            digest=digest[chosen],
            prompt=prompt[chosen],
            cls=classes[chosen],
            sketches=_sketch_matrix(sketches, chosen) if sketches and len(chosen) else None,
        ),
        work.rules.curate,
        [source.weight for source in work.sources[: work.num_train]],
        work.spec.data.validation if isinstance(work.spec.data.validation, float) else 0.0,
        list(class_names),
        work.tests,
        work.test_sketches,
    )
    return _Gathered(
        selection=_renumbered(selection, chosen),
        source=source,
        dropped={reason: np.array(rows, np.int64) for reason, rows in dropped.items()},
        seen=list(seen.values()),
        num_examples=num_examples,
        lengths=np.concatenate([np.zeros(0, np.int32), *lengths]),
        supervised=np.concatenate([np.zeros(0, np.int32), *supervised]),
        slices=slices,
        slice_names=list(slice_names),
    )


def _renumbered(selection: Selection, chosen: np.ndarray) -> Selection:
    """The same choice in numbers of all examined rows."""
    findings = [
        found._replace(rows=chosen[found.rows], twins=[int(chosen[twin]) if isinstance(twin, int) else twin for twin in found.twins])
        for found in selection.findings
    ]
    dropped = {reason: chosen[rows] for reason, rows in selection.dropped.items()}
    return Selection(chosen[selection.train], chosen[selection.validation], dropped, findings)


def _encode(column: pa.Array, names: dict[str, int], out: np.ndarray) -> None:
    """Write each value's number into `out`, naming new values as they come; nulls stay -1."""
    if column.null_count == len(column):
        return
    coded = column.dictionary_encode()
    numbers = np.array([names.setdefault(name, len(names)) for name in coded.dictionary.to_pylist()] + [-1], np.int32)
    out[:] = numbers[coded.indices.fill_null(len(numbers) - 1).to_numpy()]


def _sketch_matrix(columns: list[pa.Array], chosen: np.ndarray) -> np.ndarray:
    """uint16 [rows chosen, values]."""
    sketches = pa.chunked_array(columns).take(pa.array(chosen))
    return np.frombuffer(b"".join(chunk.as_buffer() for chunk in sketches), SKETCH_DTYPE).reshape(len(chosen), -1)


def _write(writer: StoreWriter, split: str, spool: Spool, rows: np.ndarray) -> None:
    for numbers, batch in spool.rows(rows):
        for start in range(0, len(numbers), _WRITE_ROWS):
            writer.append(split, _examples(batch.slice(start, _WRITE_ROWS)))


def _examples(rows: pa.RecordBatch) -> pa.Table:
    """Examples of these rows in a store's columns; the second example of a row and all after it have their number in the id."""
    counts = rows.column("examples").value_lengths().to_numpy()
    owner = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    examples = rows.column("examples").flatten()
    ids = rows.column("id").take(pa.array(owner)).to_pylist()
    names = [f"{id}#{n + 1}" if n else id for id, n in zip(ids, number.tolist(), strict=True)]
    columns = [examples.field(name) for name in ("input_ids", "run_weights", "run_lengths", "length", "supervised")]
    return pa.table([*columns, pa.array(names, pa.string()), rows.column("slice").take(pa.array(owner))], schema=SCHEMA)


def _check(work: _Work, spool: Spool, gathered: _Gathered) -> None:
    """Raise where the choice says that the job must not start."""
    for found in gathered.selection.findings:
        if found.action == "refuse":
            (case, *_) = _twin_cases(spool, found)
            raise DataError(
                f"{case.where}: {found.step}, as in {len(found.rows):,} rows ({case.text[:120]}).",
                f"Mend the rows, or set data.curate.{found.step} to drop or report.",
                "training_file",
            )
    names = ", ".join(source.name for source in work.inspected[: work.num_train])
    if not len(gathered.selection.train):
        reasons = {**gathered.dropped, **gathered.selection.dropped}
        why = "; ".join(f"{len(rows):,} {reason}" for reason, rows in reasons.items()) or "the weights leave none"
        raise DataError(f"{names}: no example is left to train on ({why}).", "Loosen the limits named, or add examples.", "training_file")
    if work.rules.slice_by and not gathered.slice_names:
        raise DataError(
            f"No example has a column `{work.rules.slice_by}` to slice by.",
            "Name a column of the data, or leave slice_by out.",
            "data.slice_by",
        )


# -- the report ----------------------------------------------------------------------------------------------------------


def _report(work: _Work, spool: Spool, gathered: _Gathered) -> DataReport:
    selection = gathered.selection
    read_of = np.bincount(gathered.source, minlength=len(work.sources))
    examples_of = np.zeros(len(work.sources), np.int64)
    for rows in (selection.train, selection.validation):
        np.add.at(examples_of, gathered.source[rows], gathered.num_examples[rows])
    dropped = {**gathered.dropped, **selection.dropped}
    sources = []
    for i, (source, seen) in enumerate(zip(work.sources, work.inspected, strict=True)):
        reasons = {reason: int((gathered.source[rows] == i).sum()) for reason, rows in dropped.items()}
        reasons = {reason: count for reason, count in sorted(reasons.items()) if count}
        sources.append(
            SourceReport(
                name=seen.name,
                url=seen.url,
                format=seen.format,
                bytes=seen.bytes,
                sha256=seen.sha256,
                licence=source.licence,
                weight=source.weight,
                read=int(read_of[i]),
                kept=int(read_of[i]) - sum(reasons.values()),
                dropped=reasons,
                examples=int(examples_of[i]),
            )
        )
    findings = [
        Finding(step=seen.step, action=seen.action, rows=seen.rows, detail=dict(seen.kinds), cases=_cases(spool, seen.cases))
        for seen in gathered.seen
    ]
    findings += [
        Finding(step=found.step, action=found.action, rows=len(found.rows), detail=found.detail, cases=_twin_cases(spool, found))
        for found in selection.findings
    ]
    return DataReport(
        sources=sources,
        findings=findings,
        train=_split_report(gathered, selection.train),
        validation=_split_report(gathered, selection.validation),
        recipe=work.recipe,
        template_sha256=work.chat.template_sha256,
        tokenizer_sha256=work.chat.tokenizer_sha256,
        tokenizer=work.chat.backend,
    )


def _cases(spool: Spool, cases: list[tuple[int, str]]) -> list[Case]:
    """The cases with the place of each row, and what it says where nothing else is told, personal data masked."""
    batches = spool.rows(np.array([row for row, _ in cases], np.int64))
    found = [row for _, batch in batches for row in batch.select(["id", "excerpt"]).to_pylist()]
    return [Case(where=row["id"], text=(text or mask(row["excerpt"] or "")[0])[:300]) for (_, text), row in zip(cases, found, strict=True)]


def _twin_cases(spool: Spool, found: Found) -> list[Case]:
    """The first rows of a finding, each with the row or the task that it resembles."""
    cases = []
    for i, row in enumerate(found.rows[:_NUM_CASES].tolist()):
        (case,) = _cases(spool, [(row, "")])
        twin = found.twins[i] if i < len(found.twins) else None
        if twin is not None:
            like = _cases(spool, [(twin, "")])[0].where if isinstance(twin, int) else twin
            case.text = f"like {like}: {case.text}"
        cases.append(case)
    return cases


def _split_report(gathered: _Gathered, rows: np.ndarray) -> SplitReport:
    if not len(rows):
        return SplitReport()
    counts = gathered.num_examples[rows]
    firsts = (np.cumsum(gathered.num_examples) - gathered.num_examples)[rows]
    chosen = np.repeat(firsts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    lengths = gathered.lengths[chosen]
    p50, p95, longest = np.percentile(lengths, [50, 95, 100], method="inverted_cdf").tolist()
    slices = np.bincount(np.repeat(gathered.slices[rows], counts) + 1, minlength=len(gathered.slice_names) + 1)[1:]
    return SplitReport(
        examples=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        supervised_tokens=int(gathered.supervised[chosen].sum(dtype=np.int64)),
        length_p50=p50,
        length_p95=p95,
        length_max=longest,
        lengths=_histogram(lengths),
        slices={name: int(count) for name, count in sorted(zip(gathered.slice_names, slices, strict=True)) if count},
    )


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """About twenty bins of one round width that reach up to the longest."""
    longest = int(lengths.max())
    width = next(w for power in range(10) for w in (10**power, 2 * 10**power, 5 * 10**power) if w * 20 >= longest)
    counts = np.bincount((lengths - 1) // width)
    return [((n + 1) * width, int(count)) for n, count in enumerate(counts)]


def _tell(run: RunDir, report: DataReport, cached: bool, why_not_fast: str | None) -> None:
    train, validation = report.train, report.validation
    read_rows = sum(source.read for source in report.sources)
    run.progress("prepare", done=read_rows, total=read_rows)
    run.event(
        f"{'Found the prepared' if cached else 'Prepared'} data: {train.examples:,} training and {validation.examples:,} validation "
        f"examples, {train.tokens:,} training tokens, {train.supervised_tokens:,} of them supervised.",
        cached=cached,
        tokenizer=report.tokenizer,
    )
    if why_not_fast is not None:
        run.event(f"Tokenized with the tokenizers library: {why_not_fast}.")
    for source in report.sources:
        for reason, count in source.dropped.items():
            run.event(f"{source.name}: {count:,} of {source.read:,} rows left out: {reason}.", level="warn", dropped={reason: count})
    for finding in report.findings:
        if finding.action != "drop" and finding.rows:
            cases = ", ".join(case.where for case in finding.cases[:3])
            run.event(f"{finding.step} ({finding.action}): {finding.rows:,} rows, such as {cases}.", level="warn", finding=finding.step)


# -- executors -----------------------------------------------------------------------------------------------------------


def _in_process(chat: Chat, rules: Rules, chunks: list[tuple[int, Chunk]]) -> Generator[tuple[int, pa.Table], None, None]:
    for number, chunk in chunks:
        empty = True
        for table in examine(chat, rules, chunk):
            empty = False
            yield number, table
        if empty:
            yield number, ROWS.empty_table()


def _on_ray(chat: Chat, rules: Rules, chunks: list[tuple[int, Chunk]]) -> Generator[tuple[int, pa.Table], None, None]:
    """One task for each chunk, on CPUs; tables come back in the chunks' order and memory stays flat."""
    import ray.data

    if not chunks:
        return
    orders = [{"number": number, "chunk": json.dumps(asdict(chunk))} for number, chunk in chunks]
    dataset = ray.data.from_items(orders, override_num_blocks=len(orders))
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True

    def work(batch: pa.Table) -> Iterator[pa.Table]:
        one_core()
        for order in batch.to_pylist():
            for number, table in _in_process(chat, rules, [(order["number"], Chunk(**json.loads(order["chunk"])))]):
                yield (
                    table.add_column(0, "part", pa.array([number] * max(table.num_rows, 1), pa.int32()))
                    if table.num_rows
                    else _nothing(number)
                )

    tables = dataset.map_batches(work, batch_format="pyarrow", batch_size=None, **cpu_nodes()).iter_batches(
        batch_size=None, batch_format="pyarrow"
    )
    for table in cast("Iterator[pa.Table]", tables):
        number = table.column("part")[0].as_py()
        rows = table.drop_columns(["part"])
        yield number, rows.filter(rows.column("id").is_valid()) if rows.column("id").null_count else rows


def _warm_up(chat: Chat) -> None:
    """Let a worker load what the first chunk needs while this process still looks at the sources; nothing depends on it."""
    import ray

    @ray.remote(num_cpus=1, max_retries=0, **cpu_nodes())
    def load(chat: Chat) -> None:
        one_core()
        with suppress(Exception):  # whatever it is, the chunks will meet it and tell
            chat.with_backend("fastokens").token_bytes.say([])

    load.remote(chat)


def cpu_nodes() -> dict[str, Any]:
    """Arguments that keep Ray's tasks off nodes with accelerators, where there are nodes without; asked of the cluster as it is now."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    label = "ray.io/accelerator-type"
    with_gpus = [node for node in nodes if node["Resources"].get("GPU")]
    kinds = sorted({node["Labels"][label] for node in with_gpus if label in node.get("Labels", {})})
    return {"label_selector": {label: f"!in({','.join(kinds)})"}} if kinds and len(with_gpus) < len(nodes) else {}


def _nothing(number: int) -> pa.Table:
    """A chunk without rows still has to be told; its one row has no id."""
    empty = pa.table([pa.nulls(1, field.type) for field in ROWS], schema=ROWS)
    return empty.add_column(0, "part", pa.array([number], pa.int32()))
