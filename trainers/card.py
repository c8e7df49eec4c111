"""The model card of a tuned model: what it was made from, how, and how it did. Written from a run's records alone."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trainers.catalogue import catalogue
from trainers.curve import loss_curve
from trainers.records import DataReport, EvaluationRecord, ModelRecord, PrepareRecord, RunDir, StepRecord, write_atomic
from trainers.spec import Full, JobSpec, Lora, Method

CURVE_FILE = "loss.svg"


def write_card(run: RunDir, record: ModelRecord, folder: Path) -> None:
    """Write README.md, and the loss curve beside it, into a model folder. Called again after an evaluation, it tells of that too."""
    steps = run.steps()
    if steps:
        write_atomic(folder / CURVE_FILE, loss_curve(steps))
    write_atomic(folder / "README.md", card(run, record))


def card(run: RunDir, record: ModelRecord) -> str:
    """A README.md in the form that model hubs read: YAML front matter, then Markdown. What a run did not record is left out."""
    report, spec = run.read("data_report.json", DataReport), _spec(run)
    parts = [
        _front_matter(record.base, report, spec),
        f"# {run.root.name}",
        _made(record, spec),
        _results(run.steps(), record.step),
        _evaluation(run.read("evaluation.json", EvaluationRecord)),
        _data(report, run.read("prepare.json", PrepareRecord)),
        _recipe(spec) if spec else "",
        "The job's spec, data report, metrics, events and evaluation lie in the run directory, beside this folder.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _spec(run: RunDir) -> JobSpec | None:
    try:
        return JobSpec.model_validate_json(run.path("resolved.json").read_bytes())
    except OSError:
        return None


def _front_matter(base: str, report: DataReport | None, spec: JobSpec | None) -> str:
    lines = ["---", f"base_model: {json.dumps(base)}"]
    if licence := _licence(base):
        lines.append(f"license: {json.dumps(licence)}")  # hubs spell it so
    kind = "full-fine-tuning" if spec and spec.method.type == "full" else f"{spec.method.type if spec else 'lora'}, merged"
    lines += ["library_name: transformers", "pipeline_tag: text-generation", f"tags: [{kind}, tuneyard]"]
    licences = sorted({source.licence for source in report.sources if source.licence}) if report else []
    if licences:
        lines.append(f"data_licences: {json.dumps(licences)}")
    return "\n".join([*lines, "---"])


def _licence(base: str) -> str | None:
    known = catalogue().get(base)
    return known.licence if known else None


def _made(record: ModelRecord, spec: JobSpec | None) -> str:
    """Where the weights come from, and how near they are to what was trained."""
    licence = f" (licence: {_licence(record.base) or 'not known here; see its own card'})"
    said = f"`{record.base}`{licence}, fine-tuned; these are the weights after step {record.step}"
    if record.adapter is not None:
        said = f"`{record.base}`{licence}, fine-tuned with an adapter of step {record.step}, which is merged into these weights"
    if spec and spec.method.type == "qlora":
        said += ". As the adapter was trained on a base in four bits, it is merged into what NF4 leaves of each matrix that it changes"
    if record.kl is not None and record.effect is not None:
        trained = "base and adapter apart" if record.adapter else "the checkpoint's"
        said += f". On test prompts they are {record.kl:.1g} nats per token from {trained} (what training changed: {record.effect:.2g})"
    return said + "."


def _results(steps: list[StepRecord], step: int) -> str:
    """The losses up to the chosen step as a table, and all of the run as a picture."""
    if not steps:
        return ""
    picture = ["", f"![Loss of each step]({CURVE_FILE})", "", "Losses are nats per supervised token."]
    validated = [s for s in steps if s.valid_loss is not None and s.step <= step]
    if not validated:
        until = [s for s in steps if s.step <= step] or steps
        return "\n".join(["## Results", "", f"Training loss {until[-1].train_loss:.4f} at step {until[-1].step}.", *picture])
    rows = [f"| {s.step} | {s.train_loss:.4f} | {s.valid_loss:.4f} | {s.valid_accuracy or 0:.1%} |" for s in validated]
    table = ["## Results", "", "| step | training loss | validation loss | validation token accuracy |", "|---|---|---|---|", *rows]
    if slices := validated[-1].valid_slices:
        table += ["", "| slice | validation loss | token accuracy |", "|---|---|---|"]
        table += [f"| {_cell(name)} | {told['loss']:.4f} | {told['accuracy']:.1%} |" for name, told in slices.items()]
    return "\n".join([*table, *picture])


def _evaluation(record: EvaluationRecord | None) -> str:
    if record is None or not record.tasks:
        return ""
    rows = [
        f"| {_cell(t.name)} | {t.metric} | {t.examples:,} | {t.base.get(t.metric, 0):.1%} | {t.tuned.get(t.metric, 0):.1%} |"
        for t in record.tasks
    ]
    return "\n".join(["## Evaluation", "", "| task | metric | examples | base | tuned |", "|---|---|---|---|---|", *rows])


def _data(report: DataReport | None, prepared: PrepareRecord | None) -> str:
    if report is None:
        return ""
    rows = [
        f"| {_cell(s.name)} | {s.format} | {s.kept:,} of {s.read:,} | {_cell(s.licence or 'not given')} | `{s.sha256[:16]}` |"
        for s in report.sources
    ]
    train, validation = report.train, report.validation
    told = f"{train.examples:,} training and {validation.examples:,} validation examples, {train.tokens:,} training tokens."
    if prepared is not None:
        told += f" Hash of the prepared data: `{prepared.key}`."
    head = ["| source | format | rows kept | licence | sha256 |", "|---|---|---|---|---|"]
    return "\n".join(["## Data", "", told, "", *head, *rows])


def _recipe(spec: JobSpec) -> str:
    optim, scale, name = spec.optim, spec.scale, {"adamw": "AdamW", "adamw8bit": "AdamW with moments in 8 bits"}
    extras = {
        "weight decay": optim.weight_decay,
        "label smoothing": optim.label_smoothing,
        "z-loss": optim.z_loss,
        "NEFTune noise": optim.neftune_alpha,
    }
    rows = {
        "method": _method(spec.method),
        "optimizer": f"{name[optim.type]}, betas {optim.betas[0]:g} and {optim.betas[1]:g}, gradient norm at most {optim.max_grad_norm:g}",
        "learning rate": f"{optim.learning_rate:g}, {optim.schedule} schedule, warm-up {optim.warmup_ratio:.0%}",
        "batch": f"{optim.batch_size} examples, {optim.epochs} epochs, seed {optim.seed}",
        **{key: f"{value:g}" for key, value in extras.items() if value},
        "precision": f"{scale.precision}, master weights {scale.master}",
        "loss on": {"assistant": "every answer", "last_assistant": "the last answer"}[spec.data.train_on],
        "chat template": spec.model.template if len(spec.model.template) < 100 else "of its own",
        "longest example": f"{spec.model.max_length} tokens",
        "made with": ", ".join(f"{package} {found}" for package in ("tuneyard", "torch", "transformers") if (found := _version(package))),
    }
    return "\n".join(["## Recipe", "", "| | |", "|---|---|", *(f"| {name} | {_cell(str(value))} |" for name, value in rows.items())])


def _method(method: Method) -> str:
    """A method and its own settings, in words."""
    if isinstance(method, Full):
        return "full fine-tuning: every weight was trained"
    said = "LoRA" if isinstance(method, Lora) else f"QLoRA (NF4{', double quantisation' if method.double_quant else ''})"
    if isinstance(method, Lora) and method.dora:
        said = "DoRA"
    said += f", rank {method.r}, alpha {method.alpha:g}{', rank-stabilised' if method.rslora else ''}"
    said += f", dropout {method.dropout:g}" if method.dropout else ""
    said += f", targets {method.targets if isinstance(method.targets, str) else ', '.join(method.targets)}"
    if isinstance(method, Lora) and method.modules_to_save:
        said += f", trained whole: {', '.join(method.modules_to_save)}"
    return said


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cell(text: str) -> str:
    """Text that cannot break out of a table."""
    return " ".join(text.replace("|", "\\|").split())
