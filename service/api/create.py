"""A create request -> a job: OpenAI's fields and our own `job` section become one JobSpec, or one clear refusal.

Only what the request itself gets wrong is refused here. What is wrong in the data makes the job fail later, because
clients in the field repeat a refused create for ever.
"""

from __future__ import annotations

import copy
import re
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.settings import Settings
from service.store import Job, Project, Store, new_id
from trainers import resolve
from trainers.catalogue import Base, find
from trainers.errors import SpecError, UnknownModel, UserError
from trainers.spec import JobSpec, Judge
from trainers.template import builtin_names

SUFFIX = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}")

# Hyperparameters that other services take beside OpenAI's, and the key of the spec that each one sets.
EXTRA_HYPERPARAMETERS = {
    "lora_r": "method.r",
    "lora_alpha": "method.alpha",
    "warmup_ratio": "optim.warmup_ratio",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
}

TEMPLATES = ("auto", *builtin_names())

Auto = Literal["auto"]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class Hyperparameters(BaseModel):
    model_config = ConfigDict(extra="allow")

    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0)] | None = None
    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] | None = None


class Supervised(BaseModel):
    hyperparameters: Hyperparameters | None = None


class Method(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    supervised: Supervised | None = None


class Create(BaseModel):
    """Body of POST /v1/fine_tuning/jobs. Unknown keys pass, as they do elsewhere; inside `job` they are refused."""

    model_config = ConfigDict(extra="allow")

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: list[dict[str, Any]] | None = None
    job: dict[str, Any] | None = None


class UnknownBase(UnknownModel):
    """The request names a base model that is not on offer: the request is wrong, not the address."""

    status = 400


def build(body: Create, settings: Settings, store: Store, project: Project, requested_by: str) -> Job:
    """The job that the request asks for, not yet stored. Raises UserError (400 or 404) naming the field at fault."""
    spec, base = spec_of(body, settings, store, project)
    suffix = body.suffix or (body.job or {}).get("name") or ""
    id = new_id("ftjob-")
    return Job(
        id=id,
        project_id=project.id,
        status="validating_files",
        request={
            "model": body.model,
            "training_file": body.training_file,
            "validation_file": body.validation_file,
            "metadata": body.metadata,
            "requested_by": requested_by,
        },
        spec=spec.model_dump(mode="json"),
        base=base.id,
        model_name=f"ft:{base.id}:{project.name}:{suffix}:{id.removeprefix('ftjob-')}",
        created_at=time.time(),
        result_files=[],
        attempt=0,
        released=False,
    )


def spec_of(body: Create, settings: Settings, store: Store, project: Project) -> tuple[JobSpec, Base]:
    """The request as a spec whose data paths are ids of the project's files, and its base model. Raises UserError as `build` does."""
    try:
        base = find(body.model)
    except UnknownModel as error:
        raise UnknownBase(error.message, error.remedy, "model") from None
    if body.method is not None and body.method.type != "supervised":
        raise UserError(f"`method.type` is `{body.method.type}`.", "Only `supervised` is possible here.", "method")
    for name in ("training_file", "validation_file"):
        if (file_id := getattr(body, name)) is not None and not settings.grants(file_id):
            file = store.file(project.id, file_id)
            if file is None:
                raise UserError(f"There is no file `{file_id}`.", "Upload it with purpose `fine-tune` first.", name)
            if file.purpose != "fine-tune":
                raise UserError(f"File `{file_id}` has purpose `{file.purpose}`.", "Upload it with purpose `fine-tune`.", name)
    sections = _spec(body, base)
    try:
        spec = JobSpec.parse(sections)
        resolve.defaults(spec, base)  # refuses what this base cannot do
    except SpecError as error:
        raise SpecError(error.message, error.remedy, f"job.{error.param}" if error.param else "job") from None
    if spec.model.template not in TEMPLATES:
        remedy = f"The service takes one of: {', '.join(TEMPLATES)}. For a Jinja file there is `python -m trainers.local JOB.yaml`."
        raise SpecError(f"`model.template` is `{spec.model.template}`.", remedy, "job.model.template")
    if (to := spec.checkpoint.to) is not None and not settings.grants_checkpoints(to):
        remedy = "Leave it out: they then lie in the job's own folder. Of URLs, only those below TUNEYARD_CHECKPOINT_URLS are granted."
        raise SpecError(f"`checkpoint.to` is `{to}`, where jobs of this service may not write.", remedy, "job.checkpoint.to")
    return _files_named(spec, settings, store, project), base


def echo_hyperparameters(spec: JobSpec, base: Base) -> dict[str, Any]:
    """OpenAI's three hyperparameters as the numbers in force."""
    optim = resolve.defaults(spec, base).optim
    multiplier = float(optim.learning_rate) / base.learning_rate[spec.method.type]
    return {"n_epochs": optim.epochs, "batch_size": optim.batch_size, "learning_rate_multiplier": float(f"{multiplier:.6g}")}


def _spec(body: Create, base: Base) -> dict[str, Any]:
    """The request as one spec. A value that is given in two places must be the same in both."""
    spec: dict[str, Any] = copy.deepcopy(body.job or {})

    def put(key: str, value: Any, source: str) -> None:
        *sections, last = key.split(".")
        part = spec
        for section in sections:
            part = part.setdefault(section, {})
            if not isinstance(part, dict):
                raise SpecError(
                    f"`job.{key}` cannot be set: `{section}` is no section.", "Write sections as JSON objects.", f"job.{section}"
                )
        if last in part and part[last] not in (value, "auto"):
            raise SpecError(f"`{source}` says {value!r}, but `job.{key}` says {part[last]!r}.", "Give it in one place.", source)
        part[last] = value

    if isinstance(spec.get("model"), dict) and spec["model"].get("base") in (body.model, *base.aliases):
        spec["model"]["base"] = base.id
    put("model.base", base.id, "model")
    if body.suffix is not None:
        if not SUFFIX.fullmatch(body.suffix):
            rule = "Use 1 to 64 letters, digits, hyphens and underscores, a letter or digit first."
            raise UserError(f"`suffix` is `{body.suffix}`.", rule, "suffix")
        put("name", body.suffix, "suffix")
    if body.seed is not None:
        put("optim.seed", body.seed, "seed")
    for place, given in _given_hyperparameters(body).items():
        _put_hyperparameters(given, base, place, put)
    data = spec.setdefault("data", {})
    if isinstance(data, dict):
        train = data.setdefault("train", [{"path": body.training_file}])
        paths = [source.get("path") for source in train if isinstance(source, dict)] if isinstance(train, list) else []
        if body.training_file not in paths:
            raise SpecError("`job.data.train` does not name the training file.", f"Add {{path: {body.training_file}}}.", "job.data.train")
        if body.validation_file is not None:
            if isinstance(data.get("validation"), list):
                raise SpecError(
                    "Validation data is named twice.", "Leave out `validation_file` or `job.data.validation`.", "validation_file"
                )
            data["validation"] = [{"path": body.validation_file}]
    return spec


def _given_hyperparameters(body: Create) -> dict[str, Hyperparameters]:
    """Where hyperparameters may stand (the first is the deprecated place, still used widely) -> what stands there."""
    supervised = body.method.supervised if body.method else None
    places = {
        "hyperparameters": body.hyperparameters,
        "method.supervised.hyperparameters": supervised.hyperparameters if supervised else None,
    }
    return {place: given for place, given in places.items() if given is not None}


def _put_hyperparameters(given: Hyperparameters, base: Base, place: str, put: Any) -> None:
    if given.n_epochs not in (None, "auto"):
        put("optim.epochs", given.n_epochs, f"{place}.n_epochs")
    if given.batch_size not in (None, "auto"):
        put("optim.batch_size", given.batch_size, f"{place}.batch_size")
    if isinstance(given.learning_rate_multiplier, float):
        put("optim.learning_rate", given.learning_rate_multiplier * base.learning_rate["lora"], f"{place}.learning_rate_multiplier")
    for name, value in (given.model_extra or {}).items():
        key = EXTRA_HYPERPARAMETERS.get(name)
        if key is None:
            known = ", ".join((*Hyperparameters.model_fields, *EXTRA_HYPERPARAMETERS))
            raise UserError(f"`{name}` is not a hyperparameter here.", f"Known: {known}. For all else there is `job`.", f"{place}.{name}")
        put(key, value, f"{place}.{name}")


def _files_named(spec: JobSpec, settings: Settings, store: Store, project: Project) -> JobSpec:
    """The spec, each source named after its file; refuses every path that is neither one of the project's file ids nor a granted URL."""
    judge = spec.evaluate.judge
    check_judge(judge, settings)
    if judge is not None and judge.url is None and find(judge.model).id != find(spec.model.base).id:
        remedy = "Name the base, give `url`, or evaluate with another judge once the job is done (`tuneyard eval --judge here MODEL`)."
        raise UserError(f"In a job without `url` the base itself judges, and `{judge.model}` is another model.", remedy, "judge.model")
    dump = spec.model_dump(mode="json")
    validation = dump["data"]["validation"]
    for source in (*dump["data"]["train"], *(validation if isinstance(validation, list) else ()), *dump["evaluate"]["tasks"]):
        if settings.grants(source["path"]):
            continue
        file = store.file(project.id, source["path"])
        if file is None:
            remedy = "Upload the file and put its id here; of URLs, only those are read that TUNEYARD_DATA_URLS grants."
            raise SpecError(f"`{source['path']}` is not a file of this project.", remedy, "job")
        source["name"] = source["name"] or file.filename
    return JobSpec.parse(dump)


def check_judge(judge: Judge | None, settings: Settings) -> None:
    """A judge elsewhere gets the service's own key and every answer: only its owner says where."""
    if judge is not None and judge.url is not None and not settings.grants_judge(judge.url):
        raise UserError(
            f"`{judge.url}` is no judge that this service may ask.",
            "Leave `url` out to let a model of this service judge, or let its owner grant the URL (TUNEYARD_JUDGE_URLS).",
            "judge.url",
        )
