"""Question files as their publishers ship them."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import DataError, load_questions, read_records


def picture(color, kind="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (60, 40), color).save(out, kind)
    return out.getvalue()


def mmhops_rows(n=6):
    rows = []
    for i in range(n):
        shown = [picture("red"), picture("blue", "JPEG")][: 1 + i % 2]
        rows.append(
            {
                "id": f"MMhops_test_{i:05d}",
                "problem": "<image>" * len(shown) + f"Question {i}?",
                "answer": "4",
                "answer_eval": ["3.6", "4.4"],
                "split": ["Bridge", "Compare"][i % 2],
                "problem_type": "Numerical",
                "pictures": [{"bytes": data, "path": f"{i}.png"} for data in shown],
            }
        )
    return rows


def check(questions, folder):
    assert (
        [len(q.images) for q in questions] == [1, 2, 1, 2, 1, 2]
        and questions[1].split == "Compare"
        and questions[0].answer_eval == ("3.6", "4.4")
    )
    assert all(Image.open(image).size == (60, 40) for q in questions for image in q.images)
    assert {image.parent for q in questions for image in q.images} == {
        folder / "images"
    } and questions[1].images[1].suffix == ".jpg"


def test_mmhops_parquet_in_several_files(tmp_path):
    rows = mmhops_rows()
    (tmp_path / "data").mkdir()
    for part in range(2):
        pq.write_table(
            pa.Table.from_pylist(rows[3 * part : 3 * part + 3]),
            tmp_path / "data" / f"test-0000{part}-of-00002.parquet",
        )
    check(load_questions(tmp_path, "test"), tmp_path)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    check(load_questions(tmp_path, "test"), tmp_path)  # unpacked once
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert "pictures" not in next(read_records(tmp_path, "test"))[1]  # scoring reads no pictures
    elsewhere = load_questions(tmp_path, "test", limit=2, images=tmp_path / "else")
    assert elsewhere[1].images[0].parent == tmp_path / "else" and len(elsewhere) == 2
    with pytest.raises(DataError, match="holds no train questions"):
        load_questions(tmp_path, "train")


def test_mmhops_from_the_datasets_cache(tmp_path):
    table = pa.Table.from_pylist(
        [
            row | {"pictures": row["pictures"][0]["bytes"]}
            for row in mmhops_rows()
            if row["split"] == "Bridge"
        ]
    )
    with pa.ipc.new_stream(str(tmp_path / "mmhops-test.arrow"), table.schema) as out:
        out.write_table(table)
    assert [q.id for q in load_questions(tmp_path, "test")] == [
        "MMhops_test_00000",
        "MMhops_test_00002",
        "MMhops_test_00004",
    ]


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="test.parquet is not a readable parquet file"):
        load_questions(tmp_path, "test")


def test_infoseek(tmp_path):
    (tmp_path / "images" / "00").mkdir(parents=True)
    (tmp_path / "images" / "oven_1.JPEG").write_bytes(picture("red", "JPEG"))
    (tmp_path / "images" / "00" / "oven_2.jpg").write_bytes(picture("blue", "JPEG"))
    records = [
        {
            "data_id": "infoseek_val_1",
            "image_id": "oven_1",
            "question": "How tall?",
            "answer": ["12"],
            "answer_eval": [{"wikidata": 12.0, "range": [10.8, 13.2]}],
            "data_split": "val_unseen_entity",
        },
        {
            "data_id": "infoseek_val_2",
            "image_id": "oven_2",
            "question": "Who?",
            "answer": ["Ann", "Anne"],
            "answer_eval": ["Ann", "Anne"],
            "data_split": "val_unseen_question",
        },
    ]
    (tmp_path / "infoseek_val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "types.jsonl").write_text(
        '{"data_id": "infoseek_val_1", "question_type": "numerical"}\n{"data_id": "infoseek_val_2", "question_type": "time"}\n'
    )
    first, second = load_questions(
        tmp_path, "validation", images=tmp_path / "images", qtypes=tmp_path / "types.jsonl"
    )
    assert (first.problem, first.problem_type, first.answer_eval, first.split) == (
        "<image>How tall?",
        "Numerical",
        ("10.8", "13.2"),
        "val_unseen_entity",
    )
    assert second.problem_type == "Time" and second.images[0].name == "oven_2.jpg"
    assert (
        load_questions(tmp_path / "infoseek_val.jsonl", images=tmp_path / "images")[0].problem_type
        == "Numerical"
    )  # without the types
    with pytest.raises(DataError, match="--images"):
        load_questions(tmp_path, "val")
    (tmp_path / "images" / "00" / "oven_2.jpg").unlink()
    with pytest.raises(DataError, match="infoseek_val.jsonl:2: image oven_2 is not under"):
        load_questions(tmp_path, "val", images=tmp_path / "images")


def test_evqa(tmp_path):
    (tmp_path / "images" / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "images" / "val" / "Quercus").mkdir(parents=True)
    (tmp_path / "images" / "a" / "b" / "c" / "abcd.jpg").write_bytes(picture("red", "JPEG"))
    (tmp_path / "images" / "val" / "Quercus" / "x.jpg").write_bytes(picture("blue", "JPEG"))
    (tmp_path / "images" / "val_id2name.json").write_text('{"77": "val/Quercus/x.jpg"}')
    (tmp_path / "test.csv").write_text(
        "question,answer,question_type,wikipedia_url,dataset_name,dataset_image_ids,evidence_section_id\n"
        '"Where, now?",Rome|Roma,2_hop,u,landmarks,abcd|ffff,1\nWhich?,oak&&fir,multi_answer,u,inaturalist,77,2\n'
    )
    first, second = load_questions(tmp_path, "test", images=tmp_path / "images")
    assert (first.id, first.problem, first.answer_eval, first.num_steps) == (
        "test_0",
        "<image>Where, now?",
        ("Rome", "Roma"),
        2,
    )
    assert (
        second.images[0].name == "x.jpg"
        and second.answer_eval == ("oak, fir", "oak and fir")
        and second.split == "multi_answer"
    )


def test_limit_and_shuffle(tmp_path):
    (tmp_path / "test.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": str(i),
                    "problem": "?",
                    "answer": "x",
                    "answer_eval": ["x"],
                    "problem_type": "String",
                    "split": "Bridge",
                }
            )
            + "\n"
            for i in range(50)
        )
    )
    assert [q.id for q in load_questions(tmp_path, limit=3)] == ["0", "1", "2"]
    shuffled = [q.id for q in load_questions(tmp_path, limit=10, seed=1)]
    assert (
        shuffled
        == [q.id for q in load_questions(tmp_path, limit=10, seed=1)]
        != [str(i) for i in range(10)]
    )
