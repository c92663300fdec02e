"""The house: who may import whom, and how large the root may be. Reads the files, runs nothing."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [  # a file imports from its own floor or from those above it in this list
    # these import nothing of any other floor
    ["data", "files", "reward", "dapo", "engine.distributed", "engine.batches"],
    ["retrieval", "knowledge", "atlas"],
    ["model", "engine"],
    ["rollout", "config"],
    ["evaluation", "mmhops", "build_kb"],
    ["tiny"],
    ["evaluate", "train"],
    ["benchmarks", "engine.gpu_check", "tests"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS, 1) for name in names}


def source_files() -> dict[str, Path]:
    """{module: its file} of the root and of every folder in it, tests included."""
    files = {}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]):
        folders = path.relative_to(ROOT).parts[:-1]
        if folders and (folders[0].startswith(".") or folders[0] in ("data", "runs")):
            continue  # what a run writes
        files[".".join([*folders, path.stem])] = path
    return files


def imports_of(text: str, modules) -> set[str]:
    """Which of these modules a source text imports, anywhere, inside functions too.

    >>> sorted(imports_of("import os\\ndef f():\\n    from a import b, C", {"a.b", "a"}))
    ['a', 'a.b']
    """
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                "imports are written from the root: from folder.file import name"
            )
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module)
    return found & set(modules)


FILES = source_files()
IMPORTS = {module: imports_of(path.read_text(), FILES) for module, path in FILES.items()}
HOUSE = [module for module in FILES if not module.startswith("tests.")]
FOLDERS = sorted({module.split(".")[0] for module in HOUSE if "." in module})


def place(module: str) -> str:
    """The module itself where FLOORS names it, else the folder that it is in."""
    return module if module in FLOOR else module.split(".")[0]


def test_every_file_stands_on_a_floor():
    assert {place(module) for module in FILES} <= FLOOR.keys(), "name it in FLOORS"


def test_imports_go_down_the_floors():
    upward = [
        f"{module} (floor {FLOOR[place(module)]}) imports {other} (floor {FLOOR[place(other)]})"
        for module, others in IMPORTS.items()
        for other in sorted(others)
        if FLOOR[place(other)] > FLOOR[place(module)]
    ]
    assert not upward, "\n".join(upward)


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" and ".join(error.args[1]), pytrace=False)


def test_the_engine_knows_nothing_of_questions_episodes_and_rewards():
    known = {
        module: others & {"data", "rollout", "reward"}
        for module, others in IMPORTS.items()
        if module.split(".")[0] == "engine" and module != "engine.gpu_check"  # it uses everything
    }
    assert not {module: others for module, others in known.items() if others}


def test_building_knowledge_and_building_questions_stay_apart():
    importers = [module for module, others in IMPORTS.items() if "build_kb" in others]
    assert not [module for module in importers if place(module) == "mmhops"]
    allowed = {"retrieval", "atlas", "knowledge", "data", "files", "engine.distributed"}
    assert {place(other) for other in IMPORTS["build_kb"]} <= allowed


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_in_one_line_what_lives_in_it(folder):
    path = ROOT / folder / "__init__.py"
    assert path.exists(), f"{folder} needs an __init__.py"
    tree = ast.parse(path.read_text())
    assert len(tree.body) == 1 and ast.get_docstring(tree)
    assert len(path.read_text().splitlines()) == 1


def test_the_root_is_small():
    lines = {
        module: len(path.read_text().splitlines())
        for module, path in FILES.items()
        if path.parent == ROOT
    }
    assert len(lines) <= 11, sorted(lines)
    assert not {module: count for module, count in lines.items() if count > 350}
    assert sum(lines.values()) <= 2600, lines
