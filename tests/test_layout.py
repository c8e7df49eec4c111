"""The arrows between the packages, and what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("trainers", "serve", "cluster", "service")
ALLOWED = {
    "trainers": {"trainers"},
    "serve": {
        "serve",
        *(f"trainers.{m}" for m in ("spec", "records", "errors", "catalogue", "chat", "sources", "store", "loss", "model")),
        *(f"trainers.{m}" for m in ("refusals", "repetition")),  # what counts as one in data counts as one in an answer
    },
    "cluster": {"cluster", *(f"trainers.{m}" for m in ("spec", "errors", "catalogue", "resolve"))},
    "service": {"service", "trainers", "serve", "cluster"},
}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module in PACKAGES else {node.module}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def allowed(name: str, permitted: set[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in permitted)


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_go_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        wrong = {name for name in imports(path) if not allowed(name, ALLOWED[package])}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("package", PACKAGES)
def test_init_files_are_empty(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        assert not path.read_text().strip(), path


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("trainers.spec, trainers.records, trainers.errors, trainers.catalogue", ("torch", "ray", "transformers")),
        ("trainers.chat, trainers.store, trainers.sources, trainers.batching", ("torch", "ray", "transformers")),
        ("trainers.train, trainers.local, trainers.merge", ("ray",)),
        ("service.api.app, service.runner, service.cli", ("torch", "ray", "transformers")),
    ],
)
def test_what_must_not_be_loaded(modules: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {modules}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
