"""Knowledge bases from other sources: read as published, resumable anywhere, the same bytes."""

import gzip
import json
import os
import subprocess
import sys
import time
from multiprocessing import get_context

import faiss
import numpy as np
import pytest
from conftest import ROOT, start_forkserver
from PIL import Image
from slow_index import Letters, build, build_slowly

import knowledge.index as indexing
import retrieval
from data import DataError
from knowledge.corpora import read_articles
from knowledge.pieces import by_words, splitter
from retrieval import KnowledgeBase, KnowledgeBaseError


def write_markdown(folder, n=12):
    for i in range(n):
        sub = folder / f"sub{i % 3}"
        sub.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(sub / f"picture {i}.png")
        picture = f"![a picture](picture%20{i}.png)" if i % 2 else ""
        (sub / f"{i:02d}.md").write_text(
            f"# Entity {i}\n{picture}\nIntroduction of [{i}](x.html).\n\n"
            f"## History\n{'old ' * i} times.\n\n## Size\n{i} metres.\n"
        )
    return folder


def test_markdown(tmp_path):
    articles = list(read_articles("markdown", write_markdown(tmp_path)))
    first = next(a for a in articles if a.title == "Entity 1")
    assert len(articles) == 12
    assert sum(a.image is not None for a in articles) == 6
    assert [heading for heading, _ in first.sections] == ["", "History", "Size"]
    assert first.image.name == "picture 1.png"
    assert by_words(first.title, first.sections, 48)[0] == ("", "Introduction of 1.")


def test_evqa_and_wiki6m_and_searchr1(tmp_path):
    (tmp_path / "Q42").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "Q42" / "Q421.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "Oak tree.jpg")
    (tmp_path / "evqa.json").write_text(
        json.dumps(
            {
                "https://en.wikipedia.org/wiki/Oak": {
                    "title": "Oak",
                    "url": "u",
                    "image_urls": ["https://upload.example/a/Oak%20tree.jpg"],
                    "section_titles": ["Oak", "Uses"],
                    "section_texts": ["A tree.", "Timber."],
                }
            }
        )
    )
    (tmp_path / "none.json").write_text('{"a": [}')
    ann = {
        "wikidata_id": "Q421",
        "wikipedia_title": "Ann",
        "wikipedia_content": "Ann is a name.",
    }
    bo = {
        "wikidata_id": "Q5",
        "wikipedia_title": "Bo",
        "wikipedia_content": "",
        "wikipedia_summary": "Bo is another.",
    }
    with gzip.open(tmp_path / "wiki.jsonl.gz", "wt") as file:
        file.write(json.dumps(ann) + "\n" + json.dumps(bo) + "\n")
    (tmp_path / "corpus.jsonl").write_text('{"id": "0", "contents": "\\"Oak\\"\\nA tree."}\n')
    (oak,) = read_articles("evqa", tmp_path / "evqa.json", tmp_path)
    assert oak.title == "Oak"
    assert oak.sections[1] == ("Uses", "Timber.")
    assert oak.image.name == "Oak tree.jpg"
    ann, bo = read_articles("wiki6m", tmp_path / "wiki.jsonl.gz", tmp_path)
    assert ann.image.name == "Q421.jpg"
    assert bo.image is None
    assert bo.sections == [("", "Bo is another.")]
    (passage,) = read_articles("searchr1", tmp_path / "corpus.jsonl")
    assert (passage.title, passage.sections, passage.whole) == ("Oak", [("", "A tree.")], True)
    for source, file in (
        ("evqa", "none.json"),
        ("wiki6m", "corpus.jsonl"),
        ("searchr1", "wiki.jsonl.gz"),
        ("evqa", "nowhere.json"),
    ):
        with pytest.raises(DataError, match=file):
            list(read_articles(source, tmp_path / file))


def test_every_shard_is_one_ranks_whenever_a_rank_looks(tmp_path, monkeypatch):
    """Rank 1 begins when rank 0 has written the first one already."""
    monkeypatch.setattr(indexing, "SHARD", 7)
    vectors = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    for rank in (0, 1):
        monkeypatch.setattr(indexing, "world", lambda rank=rank: (rank, 2))
        indexing.encode_shards(tmp_path, "text", vectors, np.stack)
    assert len(list(tmp_path.glob("text-*.npy"))) == 6


def test_a_truncated_jpeg_and_a_huge_picture_are_left_out(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-20_000])
    assert indexing.is_readable(tmp_path / "whole.jpg")
    assert not indexing.is_readable(tmp_path / "cut.jpg")
    monkeypatch.setattr(indexing, "MOST_PIXELS", 1000)
    assert not indexing.is_readable(tmp_path / "whole.jpg")


def test_another_nprobe_needs_no_other_index(tmp_path):
    write_markdown(tmp_path / "articles", 40)
    for nprobe in (1, 3):
        build("markdown", tmp_path / "articles", tmp_path / "kb", index="IVF2,Flat", nprobe=nprobe)
        if nprobe == 1:
            before = (tmp_path / "kb" / retrieval.TEXT_INDEX).stat().st_mtime_ns
        entry = retrieval.read_manifest(tmp_path / "kb")["encoders"]["text"]
        assert entry["nprobe"] == nprobe
    assert (tmp_path / "kb" / retrieval.TEXT_INDEX).stat().st_mtime_ns == before


def test_an_index_written_in_shards_is_faiss_own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "SHARD", 7)
    vectors = np.random.default_rng(0).standard_normal((23, 12)).astype(np.float32)
    indexing.encode_shards(tmp_path / "shards", "text", vectors, np.stack)
    assert indexing.join_shards(tmp_path / "shards", "text", 23, tmp_path / "ours.index") == 12
    index = faiss.IndexFlatIP(12)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "theirs.index"))
    assert (tmp_path / "ours.index").read_bytes() == (tmp_path / "theirs.index").read_bytes()


def test_a_folder_of_articles_becomes_a_knowledge_base(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "SHARD", 5)
    write_markdown(tmp_path / "articles")
    (tmp_path / "articles" / "sub0" / "picture 3.png").write_text("no picture")
    build("markdown", tmp_path / "articles", tmp_path / "kb")
    manifest = json.loads((tmp_path / "kb" / "manifest.json").read_text())
    assert (manifest["articles"], manifest["images"]) == (12, 5)
    assert not (tmp_path / "kb" / "shards").exists()
    monkeypatch.setattr(retrieval, "load_encoder", lambda *_: Letters())
    kb = KnowledgeBase.open(tmp_path / "kb")
    assert kb.sizes == (manifest["passages"], 5)
    ((old,),) = kb.text_search(["old old old old old"], 1)
    assert old.title == "Entity 11"
    ((red,),) = kb.image_search([Image.new("RGB", (20, 20), (220, 0, 0))], 1)
    assert red.title == "Entity 11"
    before = (tmp_path / "kb" / "manifest.json").stat().st_mtime_ns
    build("markdown", tmp_path / "articles", tmp_path / "kb")
    assert (tmp_path / "kb" / "manifest.json").stat().st_mtime_ns == before  # up to date


def test_an_index_with_cells_finds_what_the_flat_one_finds_where_all_are_visited(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(indexing, "SHARD", 5)
    monkeypatch.setattr(retrieval, "load_encoder", lambda *_: Letters())
    write_markdown(tmp_path / "articles", 60)
    kinds = {
        "flat": {},
        "cells": {"index": "IVF8,Flat", "nprobe": 8},
        "one": {"index": "IVF8,Flat"},
    }
    kinds["one"]["nprobe"] = 1
    found = {}
    for name, options in kinds.items():
        build("markdown", tmp_path / "articles", tmp_path / name, **options)
        kb = KnowledgeBase.open(tmp_path / name)
        queries = [kb.texts[row] for row in range(0, len(kb.texts), 3)]
        hits = kb.text_search(queries, 3)
        found[name] = [[round(hit.score, 3) for hit in mine] for mine in hits]
    assert found["cells"] == found["flat"]
    assert found["one"] != found["flat"]
    manifest = json.loads((tmp_path / "cells" / "manifest.json").read_text())
    assert manifest["encoders"]["text"]["index"] == "IVF8,Flat"
    assert manifest["encoders"]["text"]["nprobe"] == 8
    with pytest.raises(KnowledgeBaseError, match="--index Nonsense cannot be made"):
        build("markdown", tmp_path / "articles", tmp_path / "bad", index="Nonsense")


@pytest.mark.parametrize("rule", ["words:12", "chars:80:20"])
def test_passages_are_cut_by_words_or_by_characters(rule):
    text = " ".join(f"Word{i} and more." for i in range(40))
    cut = [piece for _, piece in splitter(rule)("Title", [("Head", text), ("", "End.")])]
    assert cut[-1] == "End."
    if rule == "words:12":
        assert all(len(f"Title {piece}".split()) <= 12 for piece in cut)
        return
    assert max(map(len, cut)) <= 80
    assert cut[0].startswith("Head: Word0 and more.")
    for first, second in zip(cut[:-2], cut[1:-1]):
        shared = next(n for n in range(20, 0, -1) if first.endswith(second[:n]))
        assert 10 <= shared <= 20  # up to a whole word less
    assert set(" ".join(cut).split()) == set(f"Head: {text} End.".split())


@pytest.mark.parametrize("rule", ["words", "words:0", "chars:100", "chars:100:100", "lines:3"])
def test_a_rule_for_passages_that_means_nothing_is_refused(rule):
    with pytest.raises(DataError, match="neither words:N"):
        splitter(rule)


def test_a_corpus_without_pictures(tmp_path, monkeypatch):
    (tmp_path / "corpus.jsonl").write_text(
        '{"id": "0", "contents": "\\"Oak\\"\\nA tree."}\n'
        '{"id": "1", "contents": "\\"Elm\\"\\nNo fruit."}\n'
    )
    build("searchr1", tmp_path / "corpus.jsonl", tmp_path / "kb")
    monkeypatch.setattr(retrieval, "E5Encoder", lambda *_, **__: Letters())
    kb = KnowledgeBase.open(tmp_path / "kb")
    assert kb.sizes == (2, 0)
    assert kb.image_search([Image.new("RGB", (5, 5))]) == [[]]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(KnowledgeBaseError, match="holds no articles"):
        build("searchr1", tmp_path / "empty.jsonl", tmp_path / "kb2")


def test_killed_three_times_the_bytes_are_the_same(tmp_path, monkeypatch):
    write_markdown(tmp_path / "articles", 60)
    monkeypatch.setattr(indexing, "SHARD", 5)
    build("markdown", tmp_path / "articles", tmp_path / "whole")
    shards = tmp_path / "cut.building" / "shards"
    moments = [
        lambda: (tmp_path / "cut.building" / "text").exists(),
        lambda: len(list(shards.glob("text-*"))) >= 9,
        lambda: (tmp_path / "joining").exists(),
    ]
    start_forkserver("slow_index")
    for moment in moments:
        process = get_context("forkserver").Process(target=build_slowly, args=(tmp_path,))
        process.start()
        give_up = time.monotonic() + 600
        while not moment():
            assert process.is_alive() and time.monotonic() < give_up
            time.sleep(0.01)
        process.kill()
        process.join()
        assert not (tmp_path / "cut").exists()
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert len(before) > 9
    build("markdown", tmp_path / "articles", tmp_path / "cut")
    for file in retrieval.FILES:
        cut = (tmp_path / "cut" / file).read_bytes()
        whole = (tmp_path / "whole" / file).read_bytes()
        assert cut == whole, file


@pytest.mark.slow
def test_two_processes_share_the_shards(tmp_path, kb_folder):
    """The real command, with the real E5, under torchrun."""
    write_markdown(tmp_path / "articles", 20)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29619",
        "build_kb.py",
        "--source",
        "markdown",
        "--path",
        tmp_path / "articles",
        "--out",
        tmp_path / "kb",
        "--text-encoder",
        kb_folder / "encoders" / "text",
        "--image-encoder",
        kb_folder / "encoders" / "image",
    ]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kb = KnowledgeBase.open(tmp_path / "kb")
    assert kb.sizes[1] == 10
    ((hit,),) = kb.text_search(["size of Entity 7"], 1)
    assert hit.title == "Entity 7"
