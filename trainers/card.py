"""The model card of a tuned model: what it was made from, by whom, how, and how it did. Written from a run's records alone."""

from __future__ import annotations

import json

from trainers.records import DataReport, RunDir, StepRecord
from trainers.spec import JobSpec


def card(run: RunDir, base: str, step: int) -> str:
    """A README.md in the form that model hubs read: YAML front matter, then Markdown. What a run did not record is left out."""
    report = run.read("data_report.json", DataReport)
    steps = [s for s in run.steps() if s.step <= step]
    parts = [
        _front_matter(base, report),
        f"# {run.root.name}",
        f"`{base}`, fine-tuned with a LoRA adapter of step {step}, which is merged into these weights.",
        _results(steps),
        _data(report),
        _recipe(run),
        "The job's spec, data report, metrics, events and evaluation lie in the run directory, beside this folder.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str, report: DataReport | None) -> str:
    lines = ["---", f"base_model: {json.dumps(base)}", "tags: [lora, merged, tuneyard]"]
    licences = sorted({source.licence for source in report.sources if source.licence}) if report else []
    if licences:
        lines.append(f"data_licences: {json.dumps(licences)}")
    return "\n".join([*lines, "---"])


def _results(steps: list[StepRecord]) -> str:
    validated = [s for s in steps if s.valid_loss is not None]
    if not validated:
        return f"Training loss {steps[-1].train_loss:.4f} nats per supervised token." if steps else ""
    rows = [f"| {s.step} | {s.train_loss:.4f} | {s.valid_loss:.4f} | {s.valid_accuracy or 0:.1%} |" for s in validated]
    table = ["## Results", "", "| step | training loss | validation loss | validation token accuracy |", "|---|---|---|---|", *rows]
    if slices := validated[-1].valid_slices:
        table += ["", "| slice | validation loss | token accuracy |", "|---|---|---|"]
        table += [f"| {_cell(name)} | {told['loss']:.4f} | {told['accuracy']:.1%} |" for name, told in slices.items()]
    return "\n".join([*table, "", "Losses are nats per supervised token."])


def _data(report: DataReport | None) -> str:
    if report is None:
        return ""
    rows = [
        f"| {_cell(s.name)} | {s.format} | {s.kept:,} of {s.read:,} | {_cell(s.licence or 'not given')} | `{s.sha256[:16]}` |"
        for s in report.sources
    ]
    train, validation = report.train, report.validation
    told = f"{train.examples:,} training and {validation.examples:,} validation examples, {train.tokens:,} training tokens."
    head = ["| source | format | rows kept | licence | sha256 |", "|---|---|---|---|---|"]
    return "\n".join(["## Data", "", told, "", *head, *rows])


def _recipe(run: RunDir) -> str:
    try:
        spec = JobSpec.model_validate_json(run.path("resolved.json").read_bytes())
    except OSError:
        return ""
    optim, method = spec.optim, spec.method
    rows = {
        "adapter": f"LoRA, rank {method.r}, alpha {method.alpha:g}{', rank-stabilised' if method.rslora else ''}, targets {method.targets}",
        "optimizer": f"AdamW, learning rate {optim.learning_rate:g}, {optim.schedule} schedule, warm-up {optim.warmup_ratio:.0%}",
        "batch": f"{optim.batch_size} examples, {optim.epochs} epochs, seed {optim.seed}",
        "precision": spec.scale.precision,
        "chat template": spec.model.template if len(spec.model.template) < 100 else "of its own",
        "longest example": f"{spec.model.max_length} tokens",
    }
    return "\n".join(["## Recipe", "", "| | |", "|---|---|", *(f"| {name} | {_cell(str(value))} |" for name, value in rows.items())])


def _cell(text: str) -> str:
    """Text that cannot break out of a table."""
    return " ".join(text.replace("|", "\\|").split())
