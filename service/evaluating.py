"""One attempt of an evaluation, as a Ray job.

    python -m service.evaluating FOLDER --attempt N

The runner writes `order.json` into the folder. Answers are kept there as they come: run again, it asks only what is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from serve.asking import Endpoint, Model
from serve.chats import Chats
from serve.deploy import wait_until_healthy
from serve.evaluate import HeldOut, evaluate, held_out
from service import evaluationreport
from service.order import EvaluationOrder, Side
from trainers.errors import Fenced, StoreError, TuneyardError
from trainers.records import OutcomeRecord, RunDir, write_atomic
from trainers.store import TokenStore

WAIT_S = 600.0  # a model that scales from zero, behind others, takes a while


def run_evaluation(run: RunDir) -> OutcomeRecord:
    """Do what `order.json` says; returns the outcome, which is also written as `outcome.json`."""
    order = run.read("order.json", EvaluationOrder)
    if order is None:
        raise FileNotFoundError(run.path("order.json"))
    try:
        _evaluate(run, order)
    except TuneyardError as error:
        if error.retry or isinstance(error, Fenced):
            raise
        return run.write("outcome.json", OutcomeRecord(status="failed", error=error.to_dict()))
    return run.write("outcome.json", OutcomeRecord(status="succeeded"))


def _evaluate(run: RunDir, order: EvaluationOrder) -> None:
    endpoint = Endpoint(order.urls[order.base.app], Path(order.serve_token_file).read_text(encoding="utf-8").strip())
    for url in dict.fromkeys(order.urls.values()):
        wait_until_healthy(url, run, "evaluate", WAIT_S)
    base, tuned = (_model(side, order) for side in (order.base, order.tuned))
    judging = Model(order.judging.name, order.judging.adapter, order.urls[order.judging.app]) if order.judging else None
    record = evaluate(
        run,
        order.tasks,
        endpoint,
        base,
        tuned,
        order.slice_by,
        validation=validation(order.store),
        judged_by=order.judge,
        judging=judging,
    )
    write_atomic(run.path("evaluation.html"), evaluationreport.page(record))


def _model(side: Side, order: EvaluationOrder) -> Model:
    return Model(side.name, side.adapter, order.urls[side.app], Chats(Path(side.folder)).of(side.adapter))


def validation(store: str | None) -> list[HeldOut]:
    """The validation split of a token store; nothing where it is gone."""
    if store is None:
        return []
    try:
        return held_out(TokenStore(Path(store), "validation"))
    except StoreError:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m service.evaluating", description="Run one attempt of an evaluation (called by the runner)."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    args = parser.parse_args()
    run = RunDir(args.folder, args.attempt, writer="driver")
    try:
        outcome = run_evaluation(run)
    except Fenced as fenced:
        print(fenced, flush=True)
        return 0
    print(outcome.status, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
