"""report.html: an evaluation as one page that needs nothing else: table, curves, responses.

    python -m evaluation.report runs/tiny/latest-eval       # write it again

The page is a template (assets/report.html) with the data put in as JSON. Its script shows all of it
as text, never as HTML, so that nothing a passage or a policy says can run or change the page.
"""

import base64
import io
import json
from pathlib import Path

from tyro.conf import Positional

from evaluation.official import PAPER
from evaluation.summary import TABLE_ROWS
from files.images import open_image
from files.records import FAULTS, read_log
from files.rows import JsonLines
from files.terminal import fail
from retrieval import IMAGE_CORPUS
from rollout import SEARCHES

TEMPLATE = Path(__file__).parent.parent / "assets" / "report.html"
MOST = 5000  # responses in a page, which holds all that it shows
CURVES = (
    "step",
    "reward_mean",
    "tool_calls_mean",
    "format_rate",
    "entropy",
    "eval_sampled_overall",
    "eval_greedy_overall",
)


def write(folder: Positional[Path], kb: Path | None = None) -> Path:
    """Write FOLDER/report.html from FOLDER's results.json and predictions.jsonl; returns its path.

    kb: where the found articles' pictures are, when it has them; the knowledge base that was
    searched unless given. The curves are those of the run that the checkpoint belongs to. Raises
    FileNotFoundError where nothing was evaluated.
    """
    result = json.loads((folder / "results.json").read_text())
    if kb is None:
        path, _, _, _, image_url, _ = result["kb"]
        kb = None if image_url else Path(path)  # a server may have other articles
    records, count = read_some(folder / "predictions.jsonl", result.get("samples", 1))
    metrics = Path(result["policy"]).parent / "metrics.jsonl"
    data = {
        "result": result,
        "rows": TABLE_ROWS,
        "paper": PAPER["mmhops"],  # of other questions
        "curves": read_curves(metrics) if metrics.exists() else [],
        "traces": records,
        "responses": count,
        "pictures": pictures(records, kb),
    }
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", as_script(data))
    part = folder / "report.part.html"
    part.write_text(page, encoding="utf-8")
    part.replace(folder / "report.html")
    return folder / "report.html"


def read_some(path: Path, samples: int) -> tuple[list[dict], int]:
    """At most MOST responses, of questions evenly drawn, and how many there are in all."""
    with open(path, encoding="utf-8") as lines:
        count = sum(1 for _ in lines)
    every = -(-count // MOST)
    with open(path, encoding="utf-8") as lines:
        shown = [json.loads(x) for i, x in enumerate(lines) if (i // samples) % every == 0]
    return shown, count


def read_curves(metrics: Path) -> list[dict]:
    """What the page plots, of each line of a metrics.jsonl."""
    return [{key: line[key] for key in CURVES if key in line} for line in read_log(metrics)]


def as_script(data: dict) -> str:
    """JSON that stands in a <script> and cannot end it, whatever the strings in it say.

    What is not a number or not finite becomes null: browsers read no NaN.
    """
    text = json.dumps(data, ensure_ascii=False, default=str)
    text = json.dumps(json.loads(text, parse_constant=lambda name: None), ensure_ascii=False)
    text = text.replace("<", "\\u003c")
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")  # line ends in scripts


def pictures(records: list[dict], kb: Path | None) -> dict[str, str]:
    """{name: small picture as a data: address} of the questions' pictures and the found articles'.

    A question's picture goes by its path, an article's by "#" and its row in the image corpus.
    """
    wanted = {path: Path(path) for record in records for path in record["trajectory"]["images"]}
    if kb and (kb / IMAGE_CORPUS).exists():
        corpus = JsonLines(kb / IMAGE_CORPUS)
        for row in sorted(found_articles(records)):
            if row < len(corpus) and corpus[row].get("image_path"):
                wanted[f"#{row}"] = kb / corpus[row]["image_path"]
    small = {name: thumbnail(path) for name, path in wanted.items()}
    return {name: data for name, data in small.items() if data}


def found_articles(records: list[dict]) -> set[int]:
    """Rows of the image corpus that any search found."""
    of_images = {name for name, search in SEARCHES.items() if search.corpus == "image"}
    rows = set()
    for record in records:
        for turn in record["trajectory"]["turns"]:
            if turn["action"] in of_images:
                rows |= {row for _title, _text, _score, row in turn["hits"]}
    return rows


def thumbnail(path: Path, size: int = 128) -> str | None:
    """A small JPEG as a data: address; None where the picture cannot be read."""
    buffer = io.BytesIO()
    try:
        image = open_image(path)
    except ValueError:
        return None
    image.thumbnail((size, size))
    image.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    import tyro

    try:
        print(f"wrote {tyro.cli(write)}")
    except FAULTS as error:
        fail(error)
