"""JobSpec: what a job is, as plain typed data. No torch and no Ray are loaded here.

One YAML file = one JSON object = `extra_body={"job": {...}}` on the wire. Unknown keys are refused with the nearest
known key, values out of range with the rule; nothing is rewritten quietly. `auto` is resolved in one visible place,
`resolve`, and the result is saved in the run directory as `resolved.json`.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainers.errors import SpecError

Auto = Literal["auto"]


class Part(BaseModel):
    """A frozen section of the spec: unknown keys and mistyped values are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Format = Literal["auto", "messages", "alpaca", "sharegpt", "prompt_completion", "bedrock", "text"]


class Source(Part):
    path: str
    """A local file, any fsspec URL (`s3://bucket/rows.parquet`), or a Hugging Face dataset (`hf://org/name`)."""
    format: Format = "auto"
    """How a row is laid out; `auto` decides by the keys of the first row and holds every other row to it."""
    columns: dict[str, str] = {}
    """Renames columns before anything else looks at them: the format's name -> the data's name, `{instruction: question}`."""
    subset: str | None = None
    """Of a Hugging Face dataset: the configuration."""
    split: str = "train"
    """Of a Hugging Face dataset: the split."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Share in the mixture: 2 trains on every example twice in an epoch, 0.5 on half of them, always the same half."""
    licence: str | None = None
    """Carried into the data report and the model card."""
    name: str | None = None
    """What errors and reports call this source; the path's last part by default."""

    @property
    def shown(self) -> str:
        return self.name or self.path.rsplit("/", 1)[-1]


class ModelPart(Part):
    base: str = "smollm2-135m-instruct"
    """A catalogue id or alias, a local Hugging Face folder, or a hub id (`org/name`)."""
    template: str = "auto"
    """The chat template: the tokenizer's own (`auto`), a built-in one (`chatml`, `llama2`, `llama3`, `mistral`, `gemma`, `alpaca`,
    `vicuna`), or a Jinja file."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 2048
    """The longest example, in tokens, template included."""
    overlength: Literal["refuse", "drop", "truncate_prompt", "split_turns"] = "refuse"
    """What happens to a longer example: the job stops and names it; it is left out; its prompt loses turns, then text, from the front;
    or its turns are spread over several examples. Never is an answer cut, and each case is counted."""


Check = Literal["off", "report", "drop"]


class NearDuplicates(Part):
    action: Check = "drop"
    """What happens to every example but the first of each kind."""
    threshold: Annotated[float, Field(ge=0.5, le=1.0)] = 0.8
    """Estimated Jaccard similarity of word 3-grams from which two examples count as one (MinHash; Broder, 1997). System messages and tools
    are left out; a long instruction that every prompt repeats still makes short examples alike, so look at the report's cases first."""


class Balance(Part):
    by: str
    """The column that names an example's class."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Class -> its share, relative to the others'; 1 for a class that is not named."""
    max_repeat: Annotated[int, Field(ge=1, le=100)] = 4
    """No example is trained on more often than this in one epoch to fill a rare class up."""


class Curate(Part):
    """What to look for in the data. `report` counts and shows cases, `drop` leaves out; every case is in the data report."""

    min_answer_chars: Annotated[int, Field(ge=0)] = 0
    """Examples whose last answer is shorter are left out."""
    max_answer_chars: Annotated[int, Field(ge=1)] | None = None
    """Examples with a longer answer are left out."""
    max_turns: Annotated[int, Field(ge=1)] | None = None
    """Conversations with more assistant turns are left out."""
    refusals: Check = "off"
    """Answers that decline ("I cannot ...") or apologise more than twice."""
    repetition: Check = "off"
    """Answers (or thoughts) that say the same thing again and again."""
    junk: Check = "off"
    """Text that is no language: replacement characters, control characters, text decoded the wrong way, answers that are mostly symbols."""
    languages: list[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]] = []
    """ISO 639-1 codes; examples with an answer that is surely in another language are left out. Empty: any."""
    personal_data: Literal["off", "report", "mask", "refuse"] = "off"
    """E-mail addresses, phone, social security, card and medical record numbers: counted, replaced by `[EMAIL]` and so on, or the job
    stops."""
    duplicates: Check = "report"
    """Examples with the same messages; the first stays."""
    near_duplicates: NearDuplicates | None = None
    """Examples that are almost the same; the first stays."""
    conflicts: Literal["off", "report", "drop", "refuse"] = "report"
    """The same prompt with different answers; `drop` leaves out all of them."""
    leakage: Literal["off", "report", "drop", "refuse"] = "report"
    """Training prompts that also stand in validation sources or evaluation tasks, and, with `near_duplicates`, examples almost like one of
    validation; `drop` leaves them out of training."""
    balance: Balance | None = None
    """Repeat rare classes and thin out frequent ones, always the same examples."""


class DataPart(Part):
    train: Annotated[list[Source], Field(min_length=1)]
    """Where the training examples come from, in order."""
    validation: Annotated[float, Field(ge=0.0, le=0.5)] | list[Source] = 0.05
    """A fraction split off the training examples by a hash of each prompt, or sources of their own."""
    train_on: Literal["assistant", "last_assistant"] = "assistant"
    """Which turns are supervised: every assistant turn, or only the last one."""
    reasoning: Literal["train", "mask", "drop"] = "train"
    """Thoughts before an answer (`reasoning_content`, or `<think>` in the text): supervised, shown but not supervised, or removed."""
    curate: Curate = Curate()
    slice_by: str | None = None
    """A column whose value groups examples in the data report and in every evaluation."""


class Adapter(Part):
    """What LoRA and QLoRA share."""

    r: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of each adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter's output is scaled by alpha / r."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead, so that a higher rank does not learn more slowly (Kalajdzievski, 2023)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are zeroed while training; which ones depends on seed, step and example alone."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Which linear layers get an adapter: all but the head, or layer names such as `q_proj`."""


class Lora(Adapter):
    type: Literal["lora"] = "lora"
    """Low-rank adapters on a frozen base (Hu et al., 2021)."""
    dora: bool = False
    """Learn each weight row's length apart from its direction (DoRA; Liu et al., 2024)."""
    modules_to_save: list[str] = []
    """Modules that are trained whole beside the adapters, by name, such as `norm` or `lm_head`."""


class QLora(Adapter):
    type: Literal["qlora"] = "qlora"
    """LoRA on a base that is kept in four bits (NF4; Dettmers et al., 2023)."""
    double_quant: bool = True
    """Also quantize the blocks' scales: 0.37 bits per weight less."""


class Full(Part):
    type: Literal["full"] = "full"
    """Every weight is trained."""


Method = Annotated[Lora | QLora | Full, Field(discriminator="type")]


class Optim(Part):
    type: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW (Loshchilov & Hutter, 2017); `adamw8bit` keeps its two moments in 8 bits (Dettmers et al., 2022), not where weights are
    sharded."""
    epochs: Annotated[int, Field(ge=1, le=50)] = 2
    """Passes over the training examples."""
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    """Examples per optimizer step, over all workers."""
    learning_rate: Auto | Annotated[float, Field(gt=0, le=1)] = "auto"
    """Peak learning rate; `auto` takes the catalogue's rate for the base and method."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls from its peak to zero after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of all steps over which the rate rises linearly."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay per unit of learning rate."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm when they exceed it."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target's probability that is spread over the whole vocabulary (Szegedy et al., 2016)."""
    z_loss: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the squared log of the softmax's denominator in the loss (Chowdhery et al., 2022)."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Uniform noise on the embeddings while training, scaled by alpha / sqrt(tokens of the example x hidden size) (NEFTune; Jain et al.,
    2023)."""
    max_spike: Annotated[float, Field(gt=1)] | None = None
    """Skip a step whose gradient norm is more than so many times the median of the last 50; off by default."""
    max_skipped: Annotated[int, Field(ge=0, le=1000)] = 3
    """Steps in a row that may be skipped (a gradient that is not finite always is) before training ends with an error."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seeds the order of examples, the adapters' first values, dropout and noise."""


class EarlyStopping(Part):
    patience: Annotated[int, Field(ge=1)] = 3
    """Validations in a row without a better loss after which training ends; the best checkpoint is the job's model."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """How much lower, in nats per token, a loss must be to count as better."""


class Validate(Part):
    every_steps: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Steps between two passes over the validation examples; `auto` makes about five in a run."""
    samples: Annotated[int, Field(ge=0, le=64)] = 4
    """Validation examples that are answered at each validation, greedily, so that one can read what the model has learned."""
    sample_tokens: Annotated[int, Field(ge=1, le=1024)] = 32
    """Longest such answer."""
    early_stopping: EarlyStopping | None = None
    """End before the last epoch where validation no longer improves."""


class CheckpointPart(Part):
    every_steps: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Steps between checkpoints; `auto` saves with every validation."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """How many of the newest full checkpoints stay (adapters of all of them stay)."""
    keep_best: bool = True
    """Also keep the one with the lowest validation loss."""
    to: str | None = None
    """Where checkpoints lie: an fsspec URL such as `s3://bucket/prefix`, or the run directory."""


class Workers(Part):
    """As many workers as are free when an attempt starts, within these bounds."""

    min: Annotated[int, Field(ge=1, le=1024)] = 1
    """Fewer are not enough: the job waits."""
    max: Annotated[int, Field(ge=1, le=1024)]
    """More are not used."""


class Scale(Part):
    workers: Auto | Annotated[int, Field(ge=1, le=1024)] | Workers = "auto"
    """Training processes, or bounds on their number; never changes which examples a step sees."""
    tokens_per_microbatch: Auto | Annotated[int, Field(ge=16)] = "auto"
    """Token budget of one forward pass on one worker; never changes the gradient beyond rounding."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the forward and backward pass."""
    master: Literal["fp32", "bf16"] = "fp32"
    """What trained weights, their gradients and AdamW's moments are kept in: 16 bytes a weight, or 8 (updates are then rounded at random,
    since most are smaller than the next bf16 number)."""
    sharding: Auto | Literal["none", "full", "hybrid"] = "auto"
    """How workers share the weights: each holds all of them; each holds its part (FSDP2); or the workers of one node do, and nodes are
    copies (HSDP). `auto` shards full fine-tuning, and adapters on a base beyond 16 GB, where there is more than one worker."""
    reshard: bool = True
    """With sharding: free a block's gathered weights after its forward pass and gather them again in the backward pass."""
    activation_checkpointing: Auto | Literal["none", "selective", "full"] = "auto"
    """What the backward pass computes again instead of keeping it: nothing, every second block, or each block. `auto`: `full` on GPUs
    where the base is beyond 4 GB, else nothing."""
    cpu_offload: bool = False
    """With sharding: keep weights, gradients and optimizer state in the host's memory."""
    compile: Auto | bool = "auto"
    """Compile each block with torch.compile. `auto`: on GPUs."""


class Export(Part):
    merge: bool = True
    """Write the tuned model as one Hugging Face folder: the adapter merged into the base."""
    formats: list[Literal["safetensors", "gguf-f16", "gguf-q8_0"]] = ["safetensors"]
    """Further forms of the tuned model: GGUF files, which llama.cpp and Ollama read, are written beside the folder."""


class EvalTask(Part):
    path: str
    """Held-out conversations, in any format that training reads; the last assistant turn is the reference."""
    metric: Literal["exact_match", "json_match", "json_schema", "regex", "contains", "choice", "rouge", "bleu", "chrf"] = "exact_match"
    """How an answer is scored: equal text (outer blanks aside), equal JSON values, JSON that meets `json_schema`, text in which `pattern`
    is found, text that holds the reference, the likeliest of `choices` by log-likelihood, or likeness to the reference."""
    name: str | None = None
    """What the report calls this task; the path's last part by default."""
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    """Longest answer."""
    ignore_case: bool = False
    """Of `exact_match`, `contains` and `regex`: capital and small letters are the same."""
    json_schema: dict[str, Any] | None = None
    """Of `json_schema`: what every answer must meet (JSON Schema, draft 2020-12; no references to other documents)."""
    pattern: str | None = None
    """Of `regex`: found in a right answer. With a group in it, what the group holds must also equal the reference."""
    choices: Annotated[list[str], Field(min_length=2)] | str | None = None
    """Of `choice`: the answers to choose from, or the column with each row's own list; the reference is one of them."""

    @model_validator(mode="after")
    def _complete(self) -> EvalTask:
        for metric, key in (("json_schema", "json_schema"), ("regex", "pattern"), ("choice", "choices")):
            if (self.metric == metric) != (getattr(self, key) is not None):
                raise ValueError(f"metric `{metric}` and the key `{key}` belong together")
        return self

    @property
    def shown(self) -> str:
        return self.name or self.path.rsplit("/", 1)[-1]


class Judge(Part):
    """A model that rates answers (LLM as a judge)."""

    url: str | None = None
    """Base URL of any OpenAI-compatible endpoint, `https://host/v1`; by default the base model itself in a job, and in an
    evaluation the service's model of this name. Its key is read from the
    environment, TUNEYARD_JUDGE_KEY, and kept nowhere."""
    model: str
    """What that endpoint calls the model."""
    cases: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Cases of each task that are judged, spread evenly over its file: a case takes six requests."""


class Evaluate(Part):
    tasks: list[EvalTask] = []
    """Held-out tasks on which base and tuned model are compared, through the endpoint."""
    judge: Judge | None = None
    """Also let a model rate both models' answers."""


class Replicas(Part):
    """Copies of a model that answers on its own (full fine-tuning, DoRA, QLoRA); those of a base serve all its adapters."""

    min: Annotated[int, Field(ge=0, le=1024)] = 0
    """Kept loaded; with 0 the model is unloaded while nobody asks for it."""
    max: Annotated[int, Field(ge=1, le=1024)] = 1
    """Most that are started while many ask."""

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max, which is {self.max}")
        return self


class Deploy(Part):
    serve: bool = True
    """Make the tuned model answer at the service's base_url."""
    replicas: Replicas = Replicas()


class JobSpec(Part):
    """A whole job. Every section but `data` has working defaults."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}$")] = "job"
    """Becomes the suffix of the tuned model's name."""
    model: ModelPart = ModelPart()
    data: DataPart
    method: Method = Lora()
    optim: Optim = Optim()
    validate_: Annotated[Validate, Field(alias="validate")] = Validate()  # pydantic owns the bare name
    checkpoint: CheckpointPart = CheckpointPart()
    scale: Scale = Scale()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    deploy: Deploy = Deploy()

    model_config = ConfigDict(populate_by_name=False, serialize_by_alias=True)

    @field_validator("method", mode="before")
    @classmethod
    def _lora_unless_told(cls, value: Any) -> Any:
        return {"type": "lora", **value} if isinstance(value, dict) else value

    @classmethod
    def parse(cls, value: Any) -> JobSpec:
        """Build a spec from plain data, or raise SpecError naming key, value, rule and remedy."""
        if not isinstance(value, dict):
            raise SpecError(
                f"A job must be a mapping of sections, not {type(value).__name__}.", "Start with `data: {train: [{path: ...}]}`."
            )
        try:
            return cls.model_validate(value, strict=False)
        except ValidationError as error:
            raise explain(error, JobSpec) from None

    @classmethod
    def load(cls, path: str | Path) -> JobSpec:
        """Read a YAML or JSON file; relative paths of data and of a template are taken from the file's own folder."""
        path = Path(path)
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(f"{path}: {error.strerror}.", "Name a job file that exists.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SpecError(f"{path} is not YAML: {' '.join(str(error).split())}.", "Mend the line it names.") from None
        spec = cls.parse(value)
        template = spec.model.template
        if template.endswith(".jinja") or "/" in template:
            spec = spec.model_copy(update={"model": spec.model.model_copy(update={"template": str((path.parent / template).resolve())})})
        return spec.with_paths(lambda p: p if "://" in p else str((path.parent / p).resolve()))

    def with_paths(self, change: Any) -> JobSpec:
        """The same spec with `change(path)` in place of every data path."""

        def moved(source: Source) -> Source:
            return source.model_copy(update={"path": change(source.path), "name": source.shown})

        data = self.data.model_copy(
            update={
                "train": [moved(s) for s in self.data.train],
                "validation": [moved(s) for s in self.data.validation] if isinstance(self.data.validation, list) else self.data.validation,
            }
        )
        tasks = [t.model_copy(update={"path": change(t.path), "name": t.shown}) for t in self.evaluate.tasks]
        return self.model_copy(update={"data": data, "evaluate": self.evaluate.model_copy(update={"tasks": tasks})})

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2)


class Placement(Part):
    """Where a job runs, as numbers: the outcome of planning, kept apart from what the job is."""

    workers: int = 1
    """Training processes."""
    threads_per_worker: int = 1
    """CPU threads of one training process."""
    device: Literal["cpu", "cuda"] = "cpu"


def explain(error: ValidationError, root: type[Part], what: str = "job") -> SpecError:
    """The first of pydantic's complaints as one line: key, value, rule; and the nearest known key for a typo."""
    # A typo explains the missing key that it causes, and the deepest complaint is the closest to what was meant.
    urgency = {"extra_forbidden": 0, "missing": 1}
    first = min(error.errors(include_url=False), key=lambda e: (urgency.get(e["type"], 2), -len(e["loc"])))
    place, known = _locate((*first["loc"], "type") if first["type"] == "union_tag_invalid" else first["loc"], root)
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1]), known, n=1)
        remedy = f"Did you mean `{near[0]}`?" if near else f"Known keys here: {', '.join(known)}."
        return SpecError(f"`{key}` is not a key of a {what}.", remedy, key)
    if first["type"] == "missing":
        return SpecError(f"`{key}` is missing.", f"Add `{place[-1]}` to the {what}.", key)
    value = json.dumps(first["input"], default=str)
    value = value if len(value) <= 80 else value[:77] + "..."
    rules = "; or ".join(
        dict.fromkeys(e["msg"] for e in error.errors(include_url=False) if e["loc"][: len(place)] == first["loc"][: len(place)])
    )
    return SpecError(f"`{key}` is {value}: {rules}.", "Change it to a value the rule allows.", key)


def _locate(loc: tuple[int | str, ...], root: type[Part]) -> tuple[list[int | str], list[str]]:
    """A complaint's place in the user's own keys, and the keys known there.

    Where a section may be one of several, pydantic adds to `loc` which of them it tried: a type's name, or the section's `type`. These are
    not the user's keys.
    """
    place: list[int | str] = []
    known: list[str] = list(_aliases(root))
    parts: list[type[Part]] = [root]
    for number, step in enumerate(loc):
        fields = {name: annotation for part in parts for name, annotation in _aliases(part).items()}
        if isinstance(step, int):
            place.append(step)
        elif chosen := [p for p in parts if step in (p.__name__, getattr(p.model_fields.get("type"), "default", None))]:
            parts, known = chosen, list(_aliases(chosen[0]))
        elif step in fields:
            place.append(step)
            known = list(fields)
            parts = _parts(fields[step])
        elif step.isidentifier() and step not in ("float", "int", "str", "bool"):
            place.append(step)
            known = list(fields) or known
        if number == len(loc) - 1 and not place:
            place.append(step)
    return place, known


def _aliases(part: type[Part]) -> dict[str, Any]:
    """Key -> annotation of a section's fields."""
    return {f.alias or name: f.annotation for name, f in part.model_fields.items()}


def _parts(annotation: Any) -> list[type[Part]]:
    """Every spec section named anywhere inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [part for inner in getattr(annotation, "__args__", ()) for part in _parts(inner)]
