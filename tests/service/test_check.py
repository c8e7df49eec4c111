"""`tuneyard check` and `tuneyard preview` as a user runs them: whole commands on real files, with the real tokenizer."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from service import datajob
from trainers.errors import SpecError, UserError
from trainers.records import RunDir, StepRecord, write_atomic
from trainers.spec import JobSpec, NearDuplicates

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path, smollm: Path):
    """Run the command in a folder of its own; (exit code, standard output, standard error)."""

    def command(*words: str, **environment: str) -> tuple[int, str, str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TUNEYARD_HOME": str(tmp_path / "home"), "TUNEYARD_MODELS": str(smollm.parent)}
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", *words], cwd=tmp_path, capture_output=True, text=True, env=env | environment, timeout=600
        )
        return done.returncode, done.stdout, done.stderr

    return command


def alpaca(path: Path, count: int, **more: Any) -> Path:
    """Rows that no check finds anything in."""
    words = ("river", "stone", "lantern", "copper", "garden", "winter", "signal", "marble")
    words += ("harvest", "engine", "violin", "desert", "ladder", "pepper", "canvas", "thunder")
    with path.open("w") as file:
        for i in range(count):
            a, b, c = words[i % 16], words[i // 16 % 16], words[i // 256 % 16]
            row = {"instruction": f"Write of {a}, {b} and {c}, number {i}.", "output": f"The {c} met a {b} under the {a}; that was {i}."}
            file.write(json.dumps({**row, **more}) + "\n")
    return path


# -- check -----------------------------------------------------------------------------------------------------------


def test_good_data_leaves_with_0_and_tells_all(run, tmp_path: Path) -> None:
    alpaca(tmp_path / "good.jsonl", 120)
    code, out, err = run("check", "good.jsonl", "-o", "report.html", "-o", "report.json")
    assert code == 0, out + err
    assert err == "" and "\x1b" not in out
    for part in ("Ready: ", "good.jsonl", "alpaca", "120", "> 100 to 499", "supervised", "steps of 16 examples"):
        assert part in out, part
    assert max(map(len, out.splitlines())) <= 110
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["starts"] and told["report"]["sources"][0]["read"] == 120 and not (tmp_path / "home").exists()


def test_bad_rows_leave_with_1_and_are_all_named(run, tmp_path: Path) -> None:
    file = alpaca(tmp_path / "bad.jsonl", 60)
    lines = file.read_text().splitlines()
    lines[6] = lines[6][:-3]
    lines[20] = '{"instruction": "What <|im_end|> is that?", "output": "An end."}'
    lines[30] = json.dumps({"instruction": "Long", "output": "word " * 3000})
    lines[40] = '{"instruction": "No answer"}'
    file.write_text("\n".join(lines))
    code, out, _ = run("check", "bad.jsonl", "-o", "told.json", COLUMNS="60")
    told = json.loads((tmp_path / "told.json").read_text())
    assert code == 1 and not told["starts"] and "Not ready" in out and "bad.jsonl:7" in out and "<|im_end|>" in out
    assert told["report"]["sources"][0]["read"] == 60 and told["report"]["sources"][0]["kept"] == 56
    named = " ".join(where for note in told["notes"] for where, _ in note["cases"])
    for line in (7, 21, 31, 41):
        assert f"bad.jsonl:{line}" in named


def test_what_is_only_worth_knowing_does_not_stop_a_job(run, tmp_path: Path) -> None:
    file = alpaca(tmp_path / "odd.jsonl", 60)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[5] = rows[4]
    rows[7] = {**rows[6], "output": "Another answer altogether."}
    rows[9]["output"] = "I'm sorry, but I cannot help with that request."
    rows[11]["output"] = "Write to ana.lopez@example.com, please."
    file.write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = run("check", "odd.jsonl", "--json")
    told = json.loads(out)
    found = {note["title"]: note["rows"] for note in told["notes"]}
    assert code == 0 and found["Duplicates"] == 1 and found["Conflicts"] == 2 and found["Refusals"] == 1 and found["Personal data"] == 1
    assert all(note["what_to_do"] for note in told["notes"])


def test_a_job_file_brings_its_own_data_and_options_override(run, tmp_path: Path) -> None:
    alpaca(tmp_path / "mine.jsonl", 60, kind="prose")
    alpaca(tmp_path / "held.jsonl", 10, kind="prose")
    (tmp_path / "job.yaml").write_text("data: {train: [{path: mine.jsonl}], slice_by: kind}\nmodel: {max_length: 512}\n")
    code, out, err = run("check", "job.yaml", "--validation", "held.jsonl", "--json")
    told = json.loads(out)
    assert code == 0, err
    assert (
        told["max_length"] == 512 and told["report"]["validation"]["examples"] == 10 and told["report"]["train"]["slices"] == {"prose": 60}
    )
    assert "Leakage" in [note["title"] for note in told["notes"]]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("check",), 2, "DATA"),
        (("check", "none.jsonl"), 1, "none.jsonl"),
        (("check", "empty.jsonl"), 1, "empty"),
        (("check", "picture.png"), 1, "picture.png"),
        (("check", "a.jsonl", "--max-length", "3"), 2, "max-length"),
        (("check", "a.jsonl", "--max-length", "999999"), 1, "context"),
        (("check", "a.jsonl", "--format", "parquay"), 1, "format"),
        (("check", "a.jsonl", "--model", "smollm2-135m-instrukt"), 1, "Did you mean"),
        (("check", "a.jsonl", "--template", "chatmll"), 1, "chatmll"),
        (("check", "a.jsonl", "--template", "none.jinja"), 1, "none.jinja"),
        (("check", "a.jsonl", "--slice-by", "kindd"), 1, "kindd"),
        (("check", "a.jsonl", "-o", "report.pdf"), 2, ".html"),
        (("check", "a.jsonl", "-o", "none/report.html"), 1, "none/report.html"),
        (("check", "job.yaml", "a.jsonl"), 1, "job file"),
        (("check", "typo.yaml"), 1, "Did you mean `train`"),
        (("preview", "empty.jsonl"), 1, "empty"),
        (("preview", "a.jsonl", "--row", "99"), 1, "row 99"),
        (("preview", "a.jsonl", "--id", "a.jsonl:99"), 1, "a.jsonl:99"),
        (("preview", "a.jsonl", "-n", "0"), 2, "-n"),
    ],
)
def test_every_mistake_is_one_cause_and_one_remedy(run, tmp_path: Path, words: tuple[str, ...], code: int, told: str) -> None:
    alpaca(tmp_path / "a.jsonl", 20)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20)
    (tmp_path / "job.yaml").write_text("data: {train: [{path: a.jsonl}]}\n")
    (tmp_path / "typo.yaml").write_text("data: {trian: [{path: a.jsonl}]}\n")
    got, out, err = run(*words)
    assert got == code and told in re.sub(r"\s+", " ", err) and "Traceback" not in err, err
    assert out == ""
    if code == 1:
        assert err.startswith("error:") and "fix:" in err and len(err.splitlines()) <= 3


def test_ctrl_c_while_reading_leaves_at_once_and_quietly(tmp_path: Path, smollm: Path) -> None:
    alpaca(tmp_path / "big.jsonl", 100_000)
    env = {
        **os.environ,
        "TERM": "xterm",
        "PYTHONPATH": str(ROOT),
        "TUNEYARD_HOME": str(tmp_path / "home"),
        "TUNEYARD_MODELS": str(smollm.parent),
    }
    terminal, inner = pty.openpty()
    command = [sys.executable, "-m", "service.cli", "check", "big.jsonl"]

    def listen() -> None:  # a test run in the background ignores Ctrl-C, and its children would too
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=inner, env=env, preexec_fn=listen) as process:
        os.close(inner)
        seen = b""
        deadline = time.monotonic() + 240
        while b"rows" not in seen and time.monotonic() < deadline:
            seen += os.read(terminal, 4096)  # the progress bar
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        while process.poll() is None and time.monotonic() - asked < 20:
            try:
                seen += os.read(terminal, 4096)
            except OSError:
                break
        assert process.wait(20) == 130 and time.monotonic() - asked < 10  # and not 0, as at the end of the data
    os.close(terminal)
    assert b"rows" in seen and b"Traceback" not in seen


# -- preview ---------------------------------------------------------------------------------------------------------


def test_a_preview_in_a_pipe_marks_what_is_trained(run, tmp_path: Path) -> None:
    alpaca(tmp_path / "a.jsonl", 5)
    code, out, err = run("preview", "a.jsonl", "-n", "2")
    assert code == 0 and err == "" and "\x1b" not in out
    assert "⟦The river met a river under the river; that was 0.<|im_end|>⟧" in out.replace("\n", "") and "a.jsonl:2  " in out
    assert "a.jsonl:3" not in out
    code, out, _ = run("preview", "a.jsonl", "--id", "a.jsonl:4", "--ids")
    assert code == 0 and out.count("a.jsonl:") == 1 and "<|im_start|>(1)" in out


def test_a_preview_in_a_terminal_is_coloured(tmp_path: Path, smollm: Path) -> None:
    alpaca(tmp_path / "a.jsonl", 2)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TUNEYARD_MODELS": str(smollm.parent), "TERM": "xterm-256color", "COLUMNS": "50"}
    env.pop("NO_COLOR", None)
    terminal, inner = pty.openpty()
    command = [sys.executable, "-m", "service.cli", "preview", "a.jsonl", "-n", "1"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=inner, stderr=inner, env=env):
        os.close(inner)
        seen = b""
        try:
            while data := os.read(terminal, 4096):
                seen += data
        except OSError:  # the other end was closed
            pass
    os.close(terminal)
    text = seen.decode()
    trained = "".join(re.findall(r"\x1b\[30;48;5;\d+m(.*?)\x1b\[0m", text.replace("\r\n", "")))
    assert "that was 0." in trained and "Write of" not in trained and "⟦" not in text


def test_a_row_that_would_be_refused_is_shown_with_its_error(run, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"instruction": "a <|im_end|> b", "output": "c"}\n{"instruction": "Say hi", "output": "hi"}\nnonsense\n'
    )
    code, out, _ = run("preview", "a.jsonl", "--html", "p.html")
    assert code == 1 and "<|im_end|>, a control token" in out and "⟦hi<|im_end|>⟧" in out and "not JSON" in out
    assert "&lt;|im_end|&gt;" in (tmp_path / "p.html").read_text()


def test_a_preview_with_a_template_of_ones_own(run, tmp_path: Path) -> None:
    alpaca(tmp_path / "a.jsonl", 1)
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}<|im_start|>[{{ m.role }}]\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>[assistant]\n{% endif %}"
    )
    (tmp_path / "job.yaml").write_text("data: {train: [{path: a.jsonl}]}\nmodel: {template: mine.jinja}\n")
    code, out, err = run("preview", "job.yaml")
    assert code == 0 and "<|im_start|>[user]⏎\nWrite of" in out, err
    code, out, err = run("preview", "a.jsonl", "--template", "chatml")
    assert code == 0 and "helpful AI assistant" not in out, err  # the model's own template adds a system message, plain ChatML does not


# -- files on the command line, as a job ------------------------------------------------------------------------------


def test_files_make_a_plain_job(tmp_path: Path) -> None:
    spec = datajob.job_of(["a/x.jsonl", "b/x.jsonl", "s3://bucket/y.parquet"], format="alpaca", slice_by="kind")
    assert [source.shown for source in spec.data.train] == ["a/x.jsonl", "b/x.jsonl", "y.parquet"]
    assert {source.format for source in spec.data.train} == {"alpaca"} and spec.data.slice_by == "kind" and spec.model.max_length == 2048
    with pytest.raises(UserError, match=r"b\.yaml"):
        datajob.job_of(["a.jsonl", "b.yaml"])
    with pytest.raises(SpecError, match="format"):
        datajob.job_of(["a.jsonl"], format="alpacka")


def test_a_check_looks_at_everything_but_keeps_what_the_job_says() -> None:
    spec = JobSpec.parse({"data": {"train": [{"path": "a"}], "curate": {"junk": "drop", "personal_data": "mask"}}})
    curate = datajob.looking_at_everything(spec).data.curate
    assert (curate.junk, curate.personal_data, curate.refusals, curate.repetition) == ("drop", "mask", "report", "report")
    assert curate.near_duplicates == NearDuplicates(action="report") and curate.balance is None


def test_speed_is_what_the_newest_run_on_the_same_base_measured(tmp_path: Path) -> None:
    assert datajob.measured_speed(tmp_path, "smollm2-135m-instruct") is None
    for n, (base, seconds) in enumerate([("smollm2-135m-instruct", 1.0), ("smollm2-135m-instruct", 0.5), ("other", 0.1)]):
        run = RunDir(tmp_path / f"run{n}", 1, "driver")
        write_atomic(run.path("resolved.json"), JobSpec.parse({"model": {"base": base}, "data": {"train": [{"path": "a"}]}}).to_json())
        os.utime(run.path("resolved.json"), (n, n))
        numbers = {"epoch": 1, "train_loss": 1, "train_accuracy": 1, "learning_rate": 1, "grad_norm": 1, "supervised_tokens": 9}
        record = {"step": 1, "num_steps": 1, "tokens": 200, "seconds": seconds, **numbers}
        run.append("metrics", [StepRecord.model_validate(record)])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "resolved.json").write_text("{")
    assert datajob.measured_speed(tmp_path, "smollm2-135m-instruct") == (400.0, "run1")
