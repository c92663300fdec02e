"""What is read is data: no file names code, starts a program, or leads out of its folder; nothing
that another made is deleted; nothing that a run made is lost.
"""

import http.server
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path
from struct import pack
from typing import get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT, WARMSTART
from PIL import Image

import evaluate
import knowledge.index as indexing
from benchmarks import fuzz
from config import PRESETS, Config, check_config
from data import DataError, load_questions
from engine import checkpoint, distributed
from evaluation.official import print_scores
from files.images import image_bytes, image_size, open_image
from files.ranges import check_ranges
from files.records import refuse_code
from files.terminal import console, fail
from files.terminal import data as data_of_others
from knowledge import client
from knowledge.client import RemoteKnowledgeBase
from knowledge.folder import is_current, publish
from mmhops import build
from mmhops.expand import Rejected, parse_object
from model import load_policy
from retrieval import KnowledgeBase, KnowledgeBaseError
from reward import RewardConfig, reward
from rollout import Response, Turn, parse_turn

# ------------------------------------------------------------------------------------- no code


CODE = {
    "tokenizer_kwargs": {"tokenizer_kwargs": {"trust_remote_code": True}},
    "auto_map": {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
}


@pytest.mark.parametrize("part", ["text", "image"])
@pytest.mark.parametrize("named", CODE.values(), ids=CODE)
def test_a_knowledge_base_that_names_code_is_refused(kb_folder, tmp_path, part, named):
    folder = tmp_path / "kb"
    shutil.copytree(kb_folder, folder, copy_function=os.link)  # nothing in it is changed
    (folder / "encoders" / part / "extra.json").write_text(json.dumps({"model_cfg": [named]}))
    with pytest.raises(DataError, match=r"extra\.json names code to be run"):
        KnowledgeBase.open(folder)


def test_a_checkpoint_that_names_code_is_refused(tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(WARMSTART, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="names code"):
        load_policy(folder)
    assert not (tmp_path / "ran").exists()


def test_deep_nesting_in_a_models_file_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(DataError, match="not readable JSON"):
        refuse_code(tmp_path)


# ------------------------------------------------------------------------------------- pictures


def test_a_picture_starts_no_program(tmp_path):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%touch ran) (w) file\n"
    (tmp_path / "x.png").write_bytes(script)
    with pytest.raises(ValueError, match=r"cannot read the image .*x\.png"):
        open_image(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"cannot read the image .*x\.png"):
        image_size(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "PCX", "TGA", "ICO"])
def test_other_kinds_of_pictures_are_refused(tmp_path, kind):
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png", kind)
    with pytest.raises(ValueError, match="cannot read the image"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_usual_pictures_are_read(tmp_path, kind):
    Image.new("RGB", (20, 16), (200, 30, 60)).save(tmp_path / "x", kind)
    opened = open_image(tmp_path / "x")
    assert (opened.mode, opened.size) == ("RGB", (20, 16))
    assert np.abs(np.array(opened)[8, 8].astype(int) - (200, 30, 60)).max() < 8


def test_a_small_file_that_claims_many_pixels_is_not_decoded(tmp_path):
    """13,351 × 13,351 pixels in a few hundred bytes of header."""
    side = 13_351

    def piece(name: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + name + data + pack(">I", zlib.crc32(name + data))

    header = pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 2) * 100), 9)
    png = b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", header) + piece(b"IDAT", pixels)
    (tmp_path / "large.png").write_bytes(png + piece(b"IEND", b""))
    with pytest.raises(ValueError, match="are more than 100,000,000 pixels"):
        open_image(tmp_path / "large.png")


def test_pictures_are_upright_on_white_and_of_eight_bits(tmp_path):
    # a camera's rotation
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)
    assert image_size(tmp_path / "turned.jpg") == (20, 40)
    # what shines through
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    # 16 bits of grey
    grey = np.full((4, 4), 128 * 256, np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


def parquet(folder: Path, split: str, rows: list[tuple[str, bytes]]):
    """The released form: pictures inside the file."""
    fixed = {
        "problem": "What is this?",
        "answer": "x",
        "answer_eval": ["x"],
        "problem_type": "String",
        "split": "Bridge",
    }
    records = [fixed | {"id": name, "images": [{"bytes": data}]} for name, data in rows]
    folder.mkdir(exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(records), folder / f"{split}.parquet")


def test_a_question_shows_its_own_picture_whatever_its_id(tmp_path):
    """The same id in two splits; and one that would lead out of the folder."""
    red, blue = (image_bytes(Image.new("RGB", (4, 4), color)) for color in ("red", "blue"))
    folder = tmp_path / "data"
    parquet(folder, "train", [("7", red), ("../../escaped", red)])
    parquet(folder, "test", [("7", blue)])
    train, escaping = load_questions(folder, "train")
    (test,) = load_questions(folder, "test")
    assert open_image(train.images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(test.images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert escaping.images[0].resolve().is_relative_to(folder.resolve())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# -------------------------------------------------------------------------------------- folders


def test_only_what_is_ours_is_replaced(kb_folder, tmp_path):
    """Questions into somebody's folder; a knowledge base into one with another manifest."""
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("years of work")
    (thesis / "manifest.json").write_text('{"version": 3}')
    with pytest.raises(DataError, match="was not built by this command"):
        build.build(kb_folder, thesis, say=lambda *_: None)
    with pytest.raises(KnowledgeBaseError, match="was not built by this command"):
        is_current(thesis, "x")
    with pytest.raises(KnowledgeBaseError, match="was not built by this command"):
        articles = tmp_path / "articles"
        articles.mkdir()
        (articles / "a.md").write_text("# A\n\nText.\n")
        spec = {"text": {"kind": "e5", "name": "x"}, "image": {"kind": "none", "name": "x"}}
        indexing.build("markdown", articles, thesis, None, spec, None, "words:9")
    assert (thesis / "chapter.txt").read_text() == "years of work"
    # a copy that somebody keeps beside the folder
    for name in ("kb", "kb.old", "kb.building"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    publish(tmp_path / "kb.building", tmp_path / "kb")
    assert (tmp_path / "kb" / "file").read_text() == "kb.building"
    assert (tmp_path / "kb.old" / "file").read_text() == "kb.old"


def saved(cfg, step: int, drawn: int = 0):
    policy, optimizer, *_ = checkpoint.load(replace(cfg, resume=True), "cpu")
    checkpoint.save(policy, optimizer, cfg, {"step": step, "drawn": drawn}, [])


def test_a_run_without_its_link_is_not_started_anew(tmp_path):
    cfg = replace(PRESETS["tiny"], out=tmp_path, resume=True)
    saved(cfg, 3)
    (tmp_path / "latest").unlink()
    metrics = '{"step": 1}\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(metrics)
    with pytest.raises(ValueError, match="step-000003 but no link `latest`") as raised:
        checkpoint.load(cfg, "cpu")
    assert (tmp_path / "metrics.jsonl").read_text() == metrics
    # what it says to do works
    (command,) = [part for part in str(raised.value).split("(") if part.startswith("ln ")]
    subprocess.run(command.split(")")[0].split(), check=True)
    *_, counters, _ = checkpoint.load(cfg, "cpu")
    assert counters["step"] == 3


def test_a_run_keeps_its_own_checkpoint_beside_anothers_higher_steps(tmp_path):
    cfg = replace(PRESETS["tiny"], out=tmp_path, keep=2)
    saved(cfg, 1)
    for step in (50, 60):
        shutil.copytree(tmp_path / "step-000001", tmp_path / f"step-{step:06d}")
    for step in (2, 3):
        saved(cfg, step)
    assert (tmp_path / "latest").resolve().name == "step-000003"
    assert checkpoint.verify(tmp_path / "latest")["step"] == 3
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == ["step-000002", "step-000003", "step-000050", "step-000060"]


def test_an_evaluation_beside_a_checkpoint_is_no_checkpoint(tmp_path):
    """It neither counts as one nor goes with one."""
    cfg = replace(PRESETS["tiny"], out=tmp_path, keep=2)
    for step in (1, 2, 3):
        saved(cfg, step)
        (tmp_path / f"step-{step:06d}-eval").mkdir()
    steps = ["step-000002", "step-000003"]
    assert [path.name for path in checkpoint.steps_in(tmp_path)] == steps
    assert len(list(tmp_path.glob("step-*-eval"))) == 3
    for number in (1_000_000, 999_999):
        (tmp_path / f"step-{number}").mkdir()
    assert [path.name for path in checkpoint.steps_in(tmp_path)][2:] == [
        "step-999999",
        "step-1000000",
    ]


def test_every_rank_goes_on_at_its_own_place_in_the_questions(tmp_path, monkeypatch):
    """One that has passed over an unreadable picture has drawn more than the others."""
    cfg = replace(PRESETS["tiny"], out=tmp_path)
    saved(cfg, 1, drawn=7)
    latest = tmp_path / "latest"
    state = json.loads((latest / "trainer.json").read_text())
    assert state["drawn"] == [7]
    assert checkpoint.verify(latest)["drawn"] == 7
    (latest / "checksums.json").write_text("{}")
    (latest / "trainer.json").write_text(json.dumps(state | {"ranks": 2, "drawn": [16, 17]}))
    for rank, drawn in enumerate((16, 17)):
        monkeypatch.setattr(checkpoint, "world", lambda rank=rank: (rank, 2))
        assert checkpoint.verify(latest)["drawn"] == drawn


def test_a_resumed_run_takes_other_settings_only_by_name(tmp_path):
    cfg = replace(PRESETS["tiny"], out=tmp_path, resume=True)
    saved(cfg, 1)
    checkpoint.load(replace(cfg, steps=99, save_every=5, kb=tmp_path), "cpu")  # changes no figure
    other = replace(cfg, lr=5e-5, group_size=4)
    with pytest.raises(ValueError, match="--group-size 8, --lr 0.0001") as raised:
        checkpoint.load(other, "cpu")
    assert "--change group_size lr" in str(raised.value)
    with pytest.raises(ValueError, match="--group-size 8"):
        checkpoint.load(replace(other, change=("lr",)), "cpu")
    checkpoint.load(replace(other, change=("lr", "--group-size")), "cpu")
    with pytest.raises(ValueError, match="--change lrr: there is no such setting"):
        checkpoint.load(replace(cfg, change=("lrr",)), "cpu")


# --------------------------------------------------------------------------------------- rewards


def paid(question, *texts: str) -> float:
    """R_action of searches and a right answer."""
    turns = [parse_turn(text) for text in texts]
    answer = Turn("x", "answer", question.answer, True)
    response = Response(question, None, None, None, None, answer=question.answer, stop="answer")
    response.turns = [*turns, answer]
    return reward(response, RewardConfig())["action"]


def test_the_same_search_in_other_words_is_paid_once(text_only):
    """Without a new passage nothing can be earned: the best total is that of one search."""
    same = [
        "capital of Chad",
        "Capital of CHAD?",
        "  capital, of   chad!",
        "«capital» of Chad.",
        "ｃapital of Ｃhad",
    ]
    images = ["1", "image 1", "IMAGE 01", " image  1 "]
    texts = [f"<think>x</think><text_search>{query}</text_search>" for query in same]
    texts += [f"<think>x</think><image_search>{name}</image_search>" for name in images]
    assert paid(text_only, *texts) == 2  # one of each kind
    other = "<think>x</think><text_search>capital of Mali</text_search>"
    assert paid(text_only, *texts, other) == 3


def test_an_empty_answer_is_no_valid_turn(policy, kb, text_only, cfg, monkeypatch):
    from test_rollout import dictate

    for answer, form in (("", 0.0), ("  ", 0.0), ("N'Djamena", 1.0)):
        turn = f"<think>x</think><answer>{answer}</answer>"
        response = dictate(monkeypatch, policy, kb, text_only, cfg, turn)
        assert response.stop == "answer"
        assert reward(response, RewardConfig())["format"] == form


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_grad_norm": -1.0},
        {"save_every": 0},
        {"top_p": 0.0},
        {"max_turns": -1},
        {"max_obs_tokens": 5},
        {"temperature": 0.0},
        {"lr": math.nan},
        {"gamma": math.inf},
        {"eps_high": -0.1},
        {"beta2": 1.5},
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_named_before_anything_is_done(wrong, tmp_path):
    (name,) = wrong
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=rf"{flag} .*: it must be "):
        check_config(replace(PRESETS["tiny"], out=tmp_path, **wrong), 1)


def test_every_number_of_a_run_has_a_range():
    """But the seeds, which may be any number, and `limit`, which may be missing."""
    hints = get_type_hints(Config, include_extras=True)
    plain = [name for name, hint in hints.items() if hint in (int, float)]
    assert plain == ["seed"]
    for preset in PRESETS.values():
        check_ranges(preset)


def test_evaluation_checks_its_settings_too():
    args = evaluate.Args(ckpt=WARMSTART, temperature=-1.0)
    with pytest.raises(ValueError, match="--temperature -1.0: it must be at least 0"):
        evaluate.settings(args)


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    """The second is refused while the first lives, and only then."""
    # another process, which takes the lock as `take` does, until its input ends
    code = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); "
        "fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB); print('taken', flush=True); "
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **pipes)
    assert first.stdout.readline() == "taken\n"
    with pytest.raises(ValueError, match="another run is writing to"):
        checkpoint.take(tmp_path)
    first.communicate()
    checkpoint.take(tmp_path)
    second = subprocess.run(command, input="", capture_output=True, text=True)
    assert "BlockingIOError" in second.stderr and not second.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_every_way_to_stop_a_run_is_a_request(number, monkeypatch):
    """Which is answered where nothing is lost; a second Ctrl-C is obeyed at once."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    monkeypatch.setattr(distributed, "STOP_REQUESTS", [])
    signal.signal(number, signal.default_int_handler)  # a shell's "&" ignores Ctrl-C
    try:
        distributed.catch_signals()
        signal.raise_signal(number)
        assert [number] == distributed.STOP_REQUESTS
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_what_nohup_ignores_stays_ignored():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        distributed.catch_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, before[signal.SIGTERM])
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


# ------------------------------------------------------------------------- texts, files, answers


def test_a_short_fuzz_finds_no_fault(monkeypatch):
    monkeypatch.chdir(ROOT)
    counts = fuzz.main(fuzz.Args(cases=500, seed=7))
    assert len(counts) == 13 and sum(counts.values()) == 500


@pytest.mark.parametrize("evil", ["\x1b[2J", "\x9b31m", "a\rb", "\u202eabc", "\ud800", "\x00"])
def test_what_a_terminal_would_obey_is_spelled_out(capsys, evil):
    console(width=200).print(data_of_others(f"{evil} [/bold] :dog:"))
    shown = capsys.readouterr().out
    assert evil not in shown and "[/bold] :dog:" in shown
    with pytest.raises(SystemExit):
        fail(ValueError(f"question {evil}"))
    said = capsys.readouterr().err
    assert evil not in said and said.startswith("error: question ")


def test_a_splits_name_is_no_markup(capsys):
    row = {"total": 1, "correct": 1, "accuracy": 100.0}
    print_scores({"benchmark": "x", "missing": 0, "[/red]\x1b[2J": row})
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["<answer>" * 50_000, "<think>" * 50_000, "</answer>" * 50_000, "{" * 200_000]
)
def test_reading_a_long_reply_takes_linear_time(text):
    started = time.process_time()
    parse_turn(text)
    with pytest.raises(Rejected):
        parse_object(text)
    assert time.process_time() - started < 5  # where it is quadratic, minutes


@pytest.mark.parametrize(
    "content, said",
    [
        (b'\xff\xfe{"id"', "UTF-8"),
        (b"[" * 100_000, "JSON"),
        (b"[1]\n", "not a record"),
        (b'{"id": {}, "problem": "x", "answer": 1, "answer_eval": ["1"], "problem_type": "String",'
         b' "split": "Bridge"}\n', "id is {}"),
        (b'{"id": "a", "problem": "x", "answer": 1, "answer_eval": "abc",'
         b' "problem_type": "String", "split": "Bridge"}\n', "answer_eval is a text"),
        (b'{"id": "a", "problem": "x", "answer": 1, "answer_eval": [NaN, 3],'
         b' "problem_type": "Numerical", "split": "Bridge"}\n', "no range of numbers"),
        (b'{"id": "a", "problem": "x", "answer": 1, "answer_eval": ["1"],'
         b' "problem_type": "String", "split": null}\n', "split is None"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named_with_its_fault(tmp_path, content, said):
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="q.jsonl:1") as refused:
        load_questions(tmp_path / "q.jsonl")
    assert said in str(refused.value)


def test_a_byte_order_mark_is_no_part_of_a_record(tmp_path):
    record = {"id": "a", "problem": "x\ud800", "answer": 1, "answer_eval": ["1"]}
    record |= {"problem_type": "String", "split": "Bridge"}
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(record).encode())
    (question,) = load_questions(tmp_path / "q.jsonl")
    assert question.problem == "x?"


def test_a_csv_with_other_dividers_says_so(tmp_path):
    (tmp_path / "q.csv").write_text("question,answer\nx\n")
    with pytest.raises(DataError, match="commas"):
        load_questions(tmp_path / "q.csv")


HITS = [[{"document": {"id": "0", "contents": "Chad\nx"}, "score": 1.0}]]
BAD_ANSWERS = {
    "a page": b"<html>",
    "nothing": b"",
    "a list": b"[]",
    "too few": json.dumps({"result": []}).encode(),
    "another shape": json.dumps({"result": [[{"document": []}]]}).encode(),
    "a score of NaN": json.dumps({"result": HITS}).replace("1.0", "NaN").encode(),
    "too deep": b"[" * 100_000,
}


@pytest.fixture
def retrieval_server():
    """A server that says what it is told to: (its address, a dictionary with what)."""
    said = {"health": b'{"entries": 5}', "retrieve": b""}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(said["health"])

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(said["retrieve"])

        def answer(self, content: bytes):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", said
    server.shutdown()


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_a_bad_answer_of_a_server_is_asked_for_again_and_then_an_error(retrieval_server, kind):
    url, said = retrieval_server
    kb = RemoteKnowledgeBase(url, url, tries=2, wait=0)
    said["retrieve"] = json.dumps({"result": HITS}).encode()
    assert kb.text_search(["capital"], 3)[0][0].title == "Chad"
    said["retrieve"] = BAD_ANSWERS[kind]
    with pytest.raises(KnowledgeBaseError, match="2 tries"):
        kb.text_search(["another"], 3)


def test_more_hits_than_were_asked_for_are_cut(retrieval_server):
    url, said = retrieval_server
    kb = RemoteKnowledgeBase(url, url, tries=1)
    said["retrieve"] = json.dumps({"result": [HITS[0] * 500]}).encode()
    assert len(kb.text_search(["capital"], 2)[0]) == 2


def test_an_answer_that_never_ends_is_given_up(retrieval_server, monkeypatch):
    url, said = retrieval_server
    kb = RemoteKnowledgeBase(url, url, tries=1)
    monkeypatch.setattr(client, "MOST_BYTES", 1000)
    said["retrieve"] = b" " * 1001
    with pytest.raises(KnowledgeBaseError, match="more than 1000 bytes"):
        kb.text_search(["capital"], 2)
