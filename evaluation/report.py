"""report.html: one evaluation as one page that needs nothing else: the table, the run's curves, every episode.

    python -m evaluation.report runs/tiny/latest-eval          # write it again from results.json and predictions.jsonl

The page is a template (assets/report.html) with the data put in as JSON; its script shows all of it as text, never as HTML, so
that nothing a passage or a policy says can run or change the page. Pictures are small JPEG copies inside the page.
"""

import base64
import io
import json
import sys
from pathlib import Path

from PIL import Image
from tyro.conf import Positional

from evaluation.summary import ROWS
from retrieval import IMAGE_CORPUS, JsonLines

TEMPLATE = Path(__file__).parent.parent / "assets" / "report.html"
PAPER = {
    "bridge": 51.35,
    "compare": 22.01,
}  # MMhops-R1 7B on MMhops (the paper's Table 2): other questions, another policy
CURVES = (
    "step",
    "reward_mean",
    "tool_calls_mean",
    "format_rate",
    "entropy",
    "eval_sampled_overall",
    "eval_greedy_overall",
)


def thumbnail(path: Path, size: int = 128) -> str | None:
    """A small JPEG as a data: address; None where the picture cannot be read."""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.thumbnail((size, size))
            image = image.convert("RGBA")
            Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(
                "RGB"
            ).save(buffer, "JPEG", quality=75)
    except OSError:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write(folder: Positional[Path], kb: Path | None = Path("data/kb")) -> Path:
    """Write FOLDER/report.html. kb: where the found articles' pictures are, when it has them.

    Raises FileNotFoundError where nothing was evaluated.
    """
    result = json.loads((folder / "results.json").read_text())
    with open(folder / "predictions.jsonl", encoding="utf-8") as file:
        traces = [json.loads(line) for line in file]
    metrics = Path(result["policy"]).parent / "metrics.jsonl"
    curves = (
        [{k: record[k] for k in CURVES if k in record} for record in map(json.loads, open(metrics))]
        if metrics.exists()
        else []
    )
    wanted = {str(path): Path(path) for trace in traces for path in trace["trajectory"]["images"]}
    if kb and (kb / IMAGE_CORPUS).exists():
        records = JsonLines(kb / IMAGE_CORPUS)
        found = {
            row
            for trace in traces
            for turn in trace["trajectory"]["turns"]
            if turn["action"] == "image_search"
            for *_, row in turn["hits"]
        }
        wanted |= {
            f"#{row}": kb / records[row]["image_path"]
            for row in found
            if row < len(records) and records[row].get("image_path")
        }
    pictures = {name: data for name, path in wanted.items() if (data := thumbnail(path))}
    data = (
        json.dumps(
            {
                "result": result,
                "rows": ROWS,
                "paper": PAPER,
                "curves": curves,
                "traces": traces,
                "pictures": pictures,
            },
            ensure_ascii=False,
            default=str,
        )
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", data)
    part = folder / "report.part.html"
    part.write_text(page, encoding="utf-8")
    part.replace(folder / "report.html")
    return folder / "report.html"


if __name__ == "__main__":
    import tyro

    try:
        print(f"wrote {tyro.cli(write)}")
    except OSError as error:
        sys.exit(f"error: {error}")
