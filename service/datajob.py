"""What `tuneyard check` and `tuneyard preview` are asked about: files named on the command line, as the job that they would be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from trainers.catalogue import find_any
from trainers.errors import UserError
from trainers.records import RunDir
from trainers.spec import Curate, JobSpec, NearDuplicates

JOB_FILES = (".yaml", ".yml")
KNOWN_RUNS = 20
"""So many of the newest runs are looked at for a measured speed."""


def job_of(
    data: list[str],
    model: str | None = None,
    template: str | None = None,
    format: str | None = None,
    max_length: int | None = None,
    validation: str | None = None,
    slice_by: str | None = None,
) -> JobSpec:
    """The job in the one job file that `data` names, or a plain job on its files and URLs; the other arguments override it."""
    if len(data) == 1 and Path(data[0]).suffix in JOB_FILES:
        spec = JobSpec.load(data[0])
    elif wrong := next((path for path in data if Path(path).suffix in JOB_FILES), None):
        raise UserError(f"{wrong} is a job file among {len(data)} files.", "Give one job file alone, or data files.")
    else:
        names = Counter(path.rsplit("/", 1)[-1] for path in data)
        sources = [{"path": path, "name": path if names[path.rsplit("/", 1)[-1]] > 1 else None} for path in data]
        spec = JobSpec.parse({"data": {"train": sources}})
        base = find_any(model or spec.model.base)
        max_length = max_length or min(spec.model.max_length, base.context)
    value = spec.model_dump(mode="json")
    given = {"base": model, "template": template, "max_length": max_length}
    value["model"] |= {key: setting for key, setting in given.items() if setting is not None}
    if format is not None:
        for source in value["data"]["train"]:
            source["format"] = format
    if validation is not None:
        value["data"]["validation"] = [{"path": validation, "format": format or "auto"}]
    if slice_by is not None:
        value["data"]["slice_by"] = slice_by
    return JobSpec.parse(value)


def looking_at_everything(spec: JobSpec) -> JobSpec:
    """The same job, but what its curation does not look for is reported too."""
    curate = spec.data.curate
    looks: dict[str, Any] = {name: "report" for name in Curate.model_fields if getattr(curate, name) == "off"}
    if curate.near_duplicates is None:
        looks["near_duplicates"] = NearDuplicates(action="report")
    return spec.model_copy(update={"data": spec.data.model_copy(update={"curate": curate.model_copy(update=looks)})})


def measured_speed(runs: Path, base: str) -> tuple[float, str] | None:
    """(tokens per second, run) of the newest run on this base model, if there is one."""
    newest = sorted((f for f in runs.glob("*/resolved.json")), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in newest[:KNOWN_RUNS]:
        try:
            spec = JobSpec.model_validate_json(file.read_bytes())
            steps = RunDir(file.parent).steps()
        except (OSError, ValueError):
            continue
        if spec.model.base == base and steps:
            return median(step.tokens / step.seconds for step in steps if step.seconds > 0), file.parent.name
    return None
