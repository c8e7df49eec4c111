"""The result files of a succeeded job: one table of steps, as base64 text (what today's clients expect) and as plain CSV."""

from __future__ import annotations

import base64
import csv
import io
import time
from collections.abc import Sequence

from service.settings import Settings
from service.store import File, Job, Store
from trainers.records import StepRecord, write_atomic

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


def table(steps: Sequence[StepRecord]) -> str:
    """CSV of all steps. Cells are numbers; a step without validation leaves its two cells empty (readers take them as NaN)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for s in steps:
        valid = ["" if value is None else f"{value:.6f}" for value in (s.valid_loss, s.valid_accuracy)]
        writer.writerow([s.step, f"{s.train_loss:.6f}", f"{s.train_accuracy:.6f}", *valid])
    return out.getvalue()


def write(settings: Settings, store: Store, job: Job, steps: Sequence[StepRecord]) -> list[str]:
    """Store both files and return their ids, [base64, plain]. Ids follow from the job's, so doing it again changes nothing."""
    text = table(steps)
    ids = []
    for kind, content in (("base64", base64.b64encode(text.encode()).decode()), ("plain", text)):
        id = f"file-{job.id.removeprefix('ftjob-')}-{kind}"
        path = settings.files / id / "content.csv"
        write_atomic(path, content)
        file = File(
            id=id,
            project_id=job.project_id,
            filename=f"step_metrics_{kind}.csv" if kind == "plain" else "step_metrics.csv",
            path=str(path.relative_to(settings.home)),
            bytes=len(content),
            purpose="fine-tune-results",
            created_at=time.time(),
            expires_at=None,
        )
        store.add_file(file)
        ids.append(id)
    return ids
