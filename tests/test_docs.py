"""The pages tell the truth: commands are known, links lead somewhere, counts are right.

A command is not run. Its file must exist, and each of its flags must stand in its own `--help`.
"""

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro  # noqa: F401 (imported late, after doctests, it stumbles over what they print)

from config import PRESETS
from reward import RewardConfig, reward
from rollout import parse_turn

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PROGRAMS = ("python", "torchrun", "make", "pip", "sbatch")

# ----------------------------------------------------------------------- reading the pages


def code_blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a page that are marked with this language.

    >>> code_blocks("a\\n```bash\\nmake test\\n```\\nb\\n```\\ntree\\n```\\n", "bash")
    ['make test\\n']
    """
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in blocks if name == language]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def commands(text: str) -> list[list[str]]:
    r"""The commands of a page, each as its words: those of bash blocks and of sentences.

    >>> commands("```bash\nmkdir a && K=x python train.py \\\n  --seed 1  # why\n```\n`make test`")
    [['python', 'train.py', '--seed', '1'], ['make', 'test']]
    """
    lines = []
    for block in code_blocks(text, "bash"):
        lines += block.replace("\\\n", " ").splitlines()
    found = []
    for line in lines + inline_code(text):
        for part in line.split("&&"):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # a quotation mark inside a sentence's code: no command
                continue
            while words and re.match(r"[A-Z_]+=", words[0]):  # KEY=value before the program
                words = words[1:]
            if len(words) > 1 and words[0] in PROGRAMS and words[-1] != "-m":
                found.append(words)
    return found


PAGE_COMMANDS = [
    (page.relative_to(ROOT), words) for page in PAGES for words in commands(page.read_text())
]

# ----------------------------------------------------------------------- asking the commands


def split_command(words: list[str]) -> tuple[str, tuple[str, ...], list[str]]:
    """(file, sub-command, flags) of a python or torchrun command; the file is relative to the root.

    >>> split_command("torchrun --nproc_per_node 8 train.py paper --kb data/kb --plan".split())
    ('train.py', ('paper',), ['--kb', '--plan'])
    >>> split_command("python -m engine.checkpoint merge --out merged".split())
    ('engine/checkpoint.py', ('merge',), ['--out'])
    >>> split_command("python train.py --seed 1".split())
    ('train.py', ('tiny',), ['--seed'])
    """
    rest = words[3:] if words[0] == "torchrun" else words[1:]  # --nproc_per_node and its number
    if rest[0] == "-m":
        file = rest[1].replace(".", "/") + ".py"
        rest = rest[2:]
    else:
        file = rest[0]
        rest = rest[1:]
    chosen = {*PRESETS, "merge", "convert"} & set(rest[:1])
    if file == "train.py" and not chosen:
        chosen = {"tiny"}  # the preset that train.py puts in when none is named
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    return file, tuple(chosen), flags


@functools.cache
def known_flags(file: str, subcommand: tuple[str, ...]) -> set[str]:
    """What the command's own --help lists. It is run in this process: torch is imported once."""
    arguments, output = sys.argv, io.StringIO()
    sys.argv = [file, *subcommand, "--help"]
    try:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / file), run_name="__main__")
    finally:
        sys.argv = arguments
    return set(re.findall(r"--[a-z][a-z0-9-]*", output.getvalue()))


@functools.cache
def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))


def fault(words: list[str]) -> str:
    """What is wrong with a command; "" where nothing is."""
    if words[0] == "make":
        unknown = [target for target in words[1:] if target not in make_targets()]
        return f"no such target: {unknown}" if unknown else ""
    if words[0] in ("pip", "sbatch"):
        files = [word for word in words if word.endswith((".txt", ".sh"))]
        missing = [file for file in files if not (ROOT / file).exists()]
        return f"no such file: {missing}" if missing else ""
    file, subcommand, flags = split_command(words)
    if not (ROOT / file).exists():
        return f"no such file: {file}"
    if not flags:
        return ""
    unknown = [flag for flag in flags if flag not in known_flags(file, subcommand)]
    return f"{file} does not know {unknown}" if unknown else ""


# ----------------------------------------------------------------------- the tests


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_names_a_file_that_exists_and_flags_that_it_knows(page):
    faults = []
    for words in commands(page.read_text()):
        wrong = fault(words)
        if wrong:
            faults.append(f"{' '.join(words)}: {wrong}")
    assert not faults, "\n".join([f"{page.name} has commands that do not work:", *faults])


def test_every_flag_in_a_sentence_belongs_to_some_command():
    known = set()
    for _, words in PAGE_COMMANDS:
        if words[0] in ("python", "torchrun"):
            file, subcommand, _ = split_command(words)
            if (ROOT / file).exists():
                known |= known_flags(file, subcommand)
    unknown = []
    for page in PAGES:
        for code in inline_code(page.read_text()):
            if code.startswith("--"):
                flags = re.findall(r"--[a-z][a-z0-9-]*", code)
                unknown += [f"{page.name}: {flag}" for flag in flags if flag not in known]
    assert not unknown


def test_the_pages_are_found_and_have_commands():
    assert len(PAGES) >= 9
    assert len(PAGE_COMMANDS) > 60


def test_a_flag_that_does_not_exist_is_noticed():
    assert "does not know" in fault(["python", "train.py", "paper", "--no-such-flag"])
    assert "no such file" in fault(["python", "-m", "mmhops.nothing", "--kb", "data/kb"])
    assert "no such target" in fault(["make", "coffee"])
    assert not fault(["python", "train.py", "--no-gate-action", "--max-turns", "2"])


def test_line_counts_in_the_readme_are_true():
    stated = re.findall(r"\[(\w+\.py)\]\(\1\), (\d+) lines", README.read_text())
    assert len(stated) == 5
    corrections = []
    for file, lines in stated:
        present = len((ROOT / file).read_text().splitlines())
        if int(lines) != present:
            corrections.append(
                f"sed -i 's/({file}), {lines} lines/({file}), {present} lines/' README.md"
            )
    assert not corrections, "\n".join(["lines have changed; to correct README:", *corrections])


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.split()) <= 1300
    tables = re.findall(r"^\|[-| :]+\|$", text, re.MULTILINE)
    assert len(tables) <= 2


def test_the_readme_has_ten_commands_of_at_most_100_characters():
    blocks = code_blocks(README.read_text(), "bash")
    lines = [line for block in blocks for line in block.splitlines()]
    assert [line for line in lines if len(line) > 100] == []
    assert [len(block.splitlines()) for block in blocks] == [2, 10]  # make; the ten commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_inside_the_repository_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text()))
    dead = []
    for target in targets:
        path, _, _ = target.partition("#")
        if path and "://" not in path and not (page.parent / path).exists():
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_source_file_that_does_not_exist(page):
    missing = []
    for code in inline_code(page.read_text()):
        for name in re.findall(r"[\w/]+\.py\b", code):
            if not (ROOT / name).exists() and not (page.parent / name).exists():
                missing.append(name)
    assert not missing


def test_the_readmes_tree_is_the_tree():
    (tree,) = [block for block in code_blocks(README.read_text()) if "engine/" in block]
    folders = set(re.findall(r"^(\w+)/ ", tree, re.MULTILINE))
    assert all((ROOT / folder).is_dir() for folder in folders)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= folders
    files = set(re.findall(r"\w+\.py", tree))
    assert files == {path.name for path in ROOT.glob("*.py")}


def test_the_readmes_response_is_well_formed_and_earns_what_it_says():
    text = README.read_text()
    (block,) = [block for block in code_blocks(text) if block.startswith("written by")]
    turns = []
    for who, mask, line in re.findall(r"^(policy|retriever) +(\d) +(.+)$", block, re.MULTILINE):
        assert mask == ("1" if who == "policy" else "0")
        if who == "policy":
            action = parse_turn(line)
            turns.append(action)
    question = SimpleNamespace(answer_eval=("Burmese",), problem_type="String")
    response = SimpleNamespace(
        question=question, turns=turns, answer=turns[-1].argument, stop="answer"
    )
    earned = reward(response, RewardConfig())
    assert len(turns) == 5 and earned["action"] == 4
    assert f"1 + 1 + 0.25 · 4 = {earned['total']:g}" in " ".join(text.split())


def test_the_lock_file_holds_what_is_installed():
    """requirements.lock: every pin of requirements.txt, with hashes, and what they bring along."""
    pins = re.findall(r"(?m)^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text())
    lock = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", lock))
    assert len(pins) > 25
    assert len(locked) > 100
    for name, version in pins:
        assert locked[name.lower().replace("_", "-")] == version, (
            "make it again by the command in its second line"
        )
    assert lock.count("--hash=sha256:") > len(locked)
