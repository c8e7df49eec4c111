"""What the README says is true: its commands exist, its tree is the tree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("trainers", "serve", "cluster", "service")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked() -> set[str]:
    return set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())


def tree() -> dict[str, str]:
    """Path -> description, from the Layout block: folders end with a slash, their files are indented below them."""
    block = README.split("## Layout")[1].split("```text\n")[1].split("```")[0]
    out, folders = {}, [""]
    for line in block.splitlines():
        name, _, text = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[: depth + 1]
        path = folders[-1] + name
        out[path] = text.strip()
        if name.endswith("/"):
            folders.append(path)
    return out


def test_every_file_in_the_tree_exists_and_is_described() -> None:
    for path, text in tree().items():
        assert (ROOT / path).exists(), path
        assert text, f"{path} has no description"


def test_every_module_is_in_the_tree() -> None:
    listed = tree()
    for path in tracked():
        package, _, rest = path.partition("/")
        if package in PACKAGES and not path.endswith("__init__.py"):
            # A folder below a package is described as a whole.
            assert (f"{package}/{rest.split('/')[0]}/" if "/" in rest else path) in listed, path


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^    |`)make ([a-z]+)", README, re.M)) <= targets


def test_every_command_exists() -> None:
    named = set(re.findall(r"(?:^    |`|bin/)tuneyard ([a-z]+)", README, re.M))
    for command in sorted(named):
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"tuneyard {command}: {done.stderr}"


def test_the_example_code_is_valid_python() -> None:
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        compile(block, "README.md", "exec")
