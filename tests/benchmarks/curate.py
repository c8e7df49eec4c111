"""What curation costs: near-duplicates, fingerprints, row checks, and the choice over a million rows.

    python -m tests.benchmarks.curate [--rows 100000] [--output RESULT.json]

Rows are made up: short instructions with short answers, every tenth an earlier one with a word or two changed. All of it runs on one
core, and times are CPU times, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from trainers.curate import RowChecks, fingerprints, sketch
from trainers.select import Rows, select
from trainers.spec import Curate


def conversations(count: int) -> list[dict[str, Any]]:
    """Short rows, about 400 characters each; every tenth is nearly a copy."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbg", k=draw.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    texts: list[tuple[list[str], list[str]]] = []
    for i in range(count):
        if i % 10 == 9:
            asked, answered = (list(said) for said in texts[draw.randrange(len(texts))])
            answered[draw.randrange(len(answered))] = draw.choice(words)
        else:
            asked = draw.choices(words, weights, k=draw.randint(8, 25))
            answered = draw.choices(words, weights, k=draw.randint(20, 80))
        texts.append((asked, answered))
    return [
        {"messages": [{"role": "user", "content": " ".join(a)}, {"role": "assistant", "content": " ".join(b)}], "tools": None}
        for a, b in texts
    ]


def near_duplicates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Sketch every row and choose: rows per minute on one core, and the share of near-duplicates among them."""
    begun = time.process_time()
    prints = np.array([fingerprints(row) for row in rows], np.uint64)
    printed = time.process_time()
    sketches = np.stack([sketch(row) for row in rows])
    sketched = time.process_time()
    chosen = select(_rows(prints[:, 0], prints[:, 1], sketches), Curate.model_validate({"near_duplicates": {}}), [1.0], 0.05, [], {})
    done = time.process_time()
    return {
        "fingerprints_us_per_row": (printed - begun) / len(rows) * 1e6,
        "sketch_us_per_row": (sketched - printed) / len(rows) * 1e6,
        "select_us_per_row": (done - sketched) / len(rows) * 1e6,
        "near_duplicates_rows_per_minute": 60 * len(rows) / (done - begun),
        "near_duplicates_found": len(chosen.dropped["near_duplicates"]) / len(rows),
    }


def row_checks(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds per row of each check, looking and finding nothing."""
    options = {
        "refusals": "report",
        "repetition": "report",
        "junk": "report",
        "languages": ["en"],
        "personal_data": "mask",
    }
    costs = {}
    for name, value in options.items():
        checks = RowChecks(Curate.model_validate({name: value}))
        begun = time.process_time()
        for row in rows:
            checks(row)
        costs[f"{name}_us_per_row"] = (time.process_time() - begun) / len(rows) * 1e6
    return costs


def million() -> dict[str, float]:
    """The choice over 1,000,000 rows with every step on; memory is what the process grew by, its columns (0.3 GB) included."""
    draw = np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = 1_000_000
    digest, prompt = draw.integers(0, 2**63, (2, count), dtype=np.int64).astype(np.uint64)
    sketches = draw.integers(0, 2**16, (count, 128), dtype=np.uint16)
    sketches[9::10] = sketches[8::10]
    curate = Curate.model_validate({"duplicates": "drop", "near_duplicates": {}, "conflicts": "drop", "leakage": "drop"})
    begun = time.process_time()
    select(_rows(digest, prompt, sketches), curate, [1.5], 0.05, [], {"exam": prompt[:1000]})
    return {
        "million_rows_s": time.process_time() - begun,
        "million_rows_peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def _rows(digest: np.ndarray, prompt: np.ndarray, sketches: np.ndarray) -> Rows:
    count = len(digest)
    return Rows(np.zeros(count, np.int32), np.zeros(count, bool), digest, prompt, np.full(count, -1, np.int32), sketches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = conversations(arguments.rows)
    result = {**million(), **near_duplicates(rows), **row_checks(rows[:5000])}
    for name, value in result.items():
        print(f"{name:34}{value:14,.2f}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
