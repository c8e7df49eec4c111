"""The driver on the cluster: the five stages of one attempt.

    python -m service.launch RUN_DIR --attempt N

The runner writes `spec.json` (a JobSpec with paths that the cluster can read) and `launch.json` (this order) into the run
directory, takes the lease for attempt N, and submits this command as one Ray job. Each stage writes its record last and is skipped
where its record is there, so the answer to every crash is to run the job again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import threading
import time
from functools import partial
from pathlib import Path

from cluster import memory
from serve.deploy import adapter_of, deploy, wait_until_healthy
from service import datareport
from service.order import LaunchOrder
from trainers import resolve
from trainers.card import write_card
from trainers.catalogue import Base, find_any
from trainers.chat import Chat
from trainers.errors import Fenced, SpecError, TuneyardError
from trainers.fetch import ensure
from trainers.records import (
    TEMPLATE_FILE,
    DataReport,
    DeployRecord,
    EvaluationRecord,
    MachineRecord,
    ModelRecord,
    OutcomeRecord,
    PrepareRecord,
    RunDir,
    TrainRecord,
    write_atomic,
)
from trainers.spec import JobSpec, Placement


def launch(run: RunDir, started: float) -> OutcomeRecord:
    """Run the stages that are not done yet; returns the outcome, which is also written as `outcome.json`. `started`: when this process
    was, in seconds since the epoch."""
    spec, order = JobSpec.model_validate_json(run.path("spec.json").read_bytes()), run.read("launch.json", LaunchOrder)
    if order is None:
        raise FileNotFoundError(run.path("launch.json"))
    try:
        outcome = _stages(spec, order, run, {"submission": order.asked_at, "handed to Ray": order.time, "driver up": started})
    except TuneyardError as error:
        if error.retry or isinstance(error, Fenced):
            raise
        outcome = OutcomeRecord(status="failed", error=error.to_dict())
    run.write("outcome.json", outcome)
    return outcome


def _stages(spec: JobSpec, order: LaunchOrder, run: RunDir, moments: dict[str, float]) -> OutcomeRecord:
    from trainers.distributed import get_ready

    base = find_any(spec.model.base)
    spec = resolve.defaults(spec, base)
    model_dir = ensure(base, Path(order.models), say=run.event)
    get_ready(spec, order.workers)

    prepared = prepare_stage(spec, model_dir, order, run)
    trained = train_stage(spec, model_dir, prepared, order, run, moments | {"data ready": time.time()})
    if trained.status != "finished":
        return OutcomeRecord(status=trained.status, error=trained.error)

    model = merge_stage(spec, base, model_dir, prepared, trained, run)
    if spec.deploy.serve and order.serve_url is not None:
        deploy_stage(order, model_dir, model, run, spec, prepared)
        evaluate_stage(spec, order, model, run)
    return OutcomeRecord(status="succeeded")


def prepare_stage(spec: JobSpec, model_dir: Path, order: LaunchOrder, run: RunDir) -> PrepareRecord:
    from trainers.prepare import prepare

    record = prepare(spec, model_dir, Path(order.stores), run, executor="ray", requested_by=order.requested_by)
    report = run.read("data_report.json", DataReport)
    assert report is not None  # `prepare` wrote it
    page = datareport.page(report, datareport.about(spec), datareport.epoch_of(report, int(spec.optim.batch_size)))
    write_atomic(run.path("data_report.html"), page)
    return record


def train_stage(
    spec: JobSpec, model_dir: Path, prepared: PrepareRecord, order: LaunchOrder, run: RunDir, moments: dict[str, float]
) -> TrainRecord:
    from trainers.distributed import train_on_ray

    done = run.read("train.json", TrainRecord)
    if done is not None and done.status == "finished":
        return done
    run.progress("train", done=0)
    return train_on_ray(
        spec, model_dir, Path(prepared.store), run, workers=order.workers, since=moments, advise=partial(_what_fits, model_dir, run)
    )


def _what_fits(model_dir: Path, run: RunDir, spec: JobSpec, place: Placement) -> str:
    """For a job that ran out of memory: the plan that would not, in a sentence; empty where none can be told."""
    machine = run.read("machine.json", MachineRecord)
    if machine is None:
        return ""
    try:
        shape = memory.ModelShape.of(json.loads((model_dir / "config.json").read_bytes()))
        return f"What would fit: {memory.suggest(shape, spec, machine.memory_bytes, place.workers, device=place.device)[0].rstrip('.')}."
    except SpecError:
        return ""


def merge_stage(spec: JobSpec, base: Base, model_dir: Path, prepared: PrepareRecord, trained: TrainRecord, run: RunDir) -> ModelRecord:
    from trainers import export, merge  # after training: torch is heavy, and this process only waits until here

    def show(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= 1 or done == total:
            shown = time.monotonic()
            run.progress("merge", done=done, total=total)

    shown = time.monotonic()
    run.progress("merge")
    step = trained.best_step or trained.step
    prompts = merge.probes(_chat(model_dir, run), Path(prepared.store))
    record = merge.merge(run, spec, base.id, model_dir, step, prompts, show)
    run.event(merge.told(spec, record))
    return export.export_all(run, spec, record, show)


def deploy_stage(
    order: LaunchOrder, model_dir: Path, model: ModelRecord, run: RunDir, spec: JobSpec | None = None, prepared: PrepareRecord | None = None
) -> None:
    """With spec and prepared data, the served model is also held to what the trained one says of held-out conversations."""
    if run.read("deploy.json", DeployRecord) is not None:
        return
    assert order.serve_url is not None and order.serve_token_file is not None
    token, chat = Path(order.serve_token_file).read_text(encoding="utf-8").strip(), _chat(model_dir, run)
    found = []
    if spec is not None and prepared is not None:
        from service import identity  # torch is heavy

        run.progress("deploy", doing="scoring held-out conversations with what was trained")
        found = identity.replays(spec, model_dir, model, Path(prepared.store), chat, run)
    record = deploy(run, model, order.model_name, _url_of(model, order), token, chat, replays=found)
    run.event(f"{order.model_name} answers (first answer after {record.first_answer_s:.1f} s).")
    if record.tolerance is not None:
        run.event(
            f"Served as trained: {record.replayed} held-out conversations, {record.compared_tokens} tokens; log-probabilities "
            f"{record.mean_difference:.3f} nats apart in the mean, {record.max_difference:.3f} at most (allowed: {record.tolerance[0]}, "
            f"{record.tolerance[1]})."
        )


def evaluate_stage(spec: JobSpec, order: LaunchOrder, model: ModelRecord, run: RunDir) -> None:
    """Compare base and tuned. A failure here is an event: the training was paid for, and the model answers."""
    from serve.evaluate import Endpoint, Model, evaluate
    from service import evaluationreport
    from service.evaluating import validation

    if not spec.evaluate.tasks or run.read("evaluation.json", EvaluationRecord) is not None:
        return
    assert order.serve_url is not None and order.serve_token_file is not None
    token = Path(order.serve_token_file).read_text(encoding="utf-8").strip()
    try:
        adapter = adapter_of(run, model)
        model_dir = ensure(find_any(model.base), Path(order.models))
        tuned = Model(order.model_name, str(adapter) if adapter else None, _url_of(model, order), _chat(model_dir, run))
        endpoint = Endpoint(order.serve_url, token)
        for url in {endpoint.url, tuned.url or endpoint.url}:  # after a restart, or for a whole model's base, nobody has waited yet
            wait_until_healthy(url, run, "evaluate")
        prepared = run.read("prepare.json", PrepareRecord)
        record = evaluate(
            run,
            spec.evaluate.tasks,
            endpoint,
            Model(model.base, chat=Chat.load(model_dir)),
            tuned,
            spec.data.slice_by,
            validation=validation(prepared.store if prepared else None),
            judged_by=spec.evaluate.judge,
        )
        write_atomic(run.path("evaluation.html"), evaluationreport.page(record))
    except Fenced:
        raise
    except Exception as error:  # whatever went wrong here, the model is trained and answers
        run.event(f"Evaluation failed: {error}", "error")
        return
    if model.merged is not None:
        write_card(run, model, run.path(model.merged))  # again, now with these results
    for line in evaluationreport.lines(record):
        run.event(line)


def _url_of(model: ModelRecord, order: LaunchOrder) -> str:
    """Where the tuned model answers: through the base's app, or its own."""
    url = order.serve_url if model.served == "adapter" else order.model_url
    assert url is not None  # the runner named both
    return url


def _chat(model_dir: Path, run: RunDir) -> Chat:
    """The chat that the run's examples were rendered with: a Jinja file that the spec names may have changed since."""
    return Chat.load(model_dir, run.path(TEMPLATE_FILE).read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m service.launch", description="Run one attempt of a job (called by the runner).")
    parser.add_argument("run", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    args = parser.parse_args()
    run = RunDir(args.run, args.attempt, writer="driver")
    started = time.time()
    # Ray Train and Ray Data take a second to load, and the cluster takes a second to answer.
    loading = threading.Thread(target=importlib.import_module, args=("trainers.distributed",), daemon=True)
    loading.start()
    import ray

    ray.init(logging_level=logging.WARNING, log_to_driver=True)
    try:
        outcome = launch(run, started)
    except Fenced as fenced:
        print(fenced, flush=True)
        return 0
    except Exception as error:  # the runner decides whether to try again; the owner is told why in one line
        run.event(f"Attempt {args.attempt} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", "error")
        raise
    print(f"{outcome.status} after {time.time() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
