"""A sheet on which a person marks questions as right or wrong, and the rate that comes of it.

    python -m mmhops.quality --sheet 100 --out sheet.html
    python -m mmhops.quality --read-sheet marks.json     # what the page's button saved

The page needs nothing else: pictures are inside, marks stay in the browser until they are saved.
"""

import base64
import html
import io
import json
from pathlib import Path

from data import DataError, Question
from files.images import open_image
from files.records import KnowledgeBaseError
from files.rows import JsonLines
from retrieval import TEXT_CORPUS

MARKS = ("right", "wrong", "unsure")
LARGEST = 240  # side of a picture on the page, in pixels
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; }}
header {{ position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc; }}
header {{ padding: .5rem 0; }}
article {{ border: 1px solid #ccc; border-radius: .5rem; padding: 1rem; margin: 1rem 0; }}
article.right {{ border-left: .5rem solid #009e73; }}
article.wrong {{ border-left: .5rem solid #d55e00; }}
article.unsure {{ border-left: .5rem solid #999; }}
img {{ max-height: 10rem; border: 1px solid #ddd; margin-right: 1rem; }}
h2 {{ font-size: 1.1rem; margin: .5rem 0; }}
ol {{ padding-left: 1.5rem; }}
li p {{ margin: 0; color: #555; font-size: .9rem; }}
label {{ margin-right: 1.5rem; }}
</style>
<header><b>{title}</b> &middot; <span id="done">0</span> of {count} marked
<button id="save">save marks.json</button></header>
<p>Right: the question is clear, its answer is the only right one, and the chain leads to it.</p>
{articles}
<script>
const marks = Object.create(null);
document.addEventListener("change", event => {{
  const article = event.target.closest("article");
  article.className = marks[article.dataset.id] = event.target.value;
  document.getElementById("done").textContent = Object.keys(marks).length;
}});
document.getElementById("save").addEventListener("click", () => {{
  const blob = new Blob([JSON.stringify({{count: {count}, marks}}, null, 1)]);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "marks.json";
  link.click();
}});
</script>
</html>
"""


def write_sheet(questions: list[Question], kb: Path, out: Path, title: str):
    """The page. Raises KnowledgeBaseError where the corpus is not the questions' own."""
    texts = JsonLines(kb / TEXT_CORPUS, "contents")
    articles = "\n".join(article(question, texts) for question in questions)
    page = PAGE.format(title=html.escape(title), count=len(questions), articles=articles)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def article(question: Question, texts: JsonLines) -> str:
    """One question: pictures, text, answer, what each step of its chain reads, the three marks."""
    name = html.escape(question.id, quote=True)
    problem = html.escape(question.problem.replace("<image>", " ").strip())
    accepted = html.escape(" | ".join(question.answer_eval))
    steps = "".join(step(hop, texts) for hop in question.hops or ())
    buttons = "".join(
        f'<label><input type="radio" name="{name}" value="{mark}"> {mark}</label>' for mark in MARKS
    )
    return (
        f'<article data-id="{name}"><div>{"".join(map(picture, question.images))}</div>'
        f"<h2>{problem}</h2><p>Answer: <b>{html.escape(question.answer)}</b> (accepted: {accepted})"
        f"</p><ol>{steps}</ol>{buttons}</article>"
    )


def step(hop, texts: JsonLines) -> str:
    if hop.action == "image_search":
        return f"<li>image {html.escape(hop.about)} shows <b>{html.escape(hop.result)}</b></li>"
    if hop.rows and max(hop.rows) >= len(texts):
        raise KnowledgeBaseError(
            f"a question reads passage {max(hop.rows)}, and {texts.path} has {len(texts)}; name "
            "the knowledge base of these questions with --kb"
        )
    passages = "".join(f"<p>{html.escape(texts[row])}</p>" for row in hop.rows[:3])
    asked = html.escape(f"{hop.relation} of {hop.about}" if hop.relation else hop.query)
    return f"<li>{asked}: <b>{html.escape(hop.result)}</b>{passages}</li>"


def picture(path: Path) -> str:
    """An <img> that holds its bytes."""
    image = open_image(path)
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def read_marks(path: Path) -> dict:
    """{"right", "wrong", "unsure", "rate", "interval"} of a saved file: the rate of right ones
    among those that were decided, in percent, with its 95% interval (Wilson). Raises DataError.
    """
    try:
        marks = json.loads(path.read_text(encoding="utf-8"))["marks"]
        counts = {mark: list(marks.values()).count(mark) for mark in MARKS}
        if sum(counts.values()) != len(marks):
            raise ValueError("a mark is none of " + ", ".join(MARKS))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not what the sheet's button saves ({error})") from None
    decided = counts["right"] + counts["wrong"]
    if not decided:
        raise DataError(f"{path} marks no question as right or wrong")
    low, high = wilson(counts["right"], decided)
    rate = 100 * counts["right"] / decided
    return counts | {"rate": round(rate, 1), "interval": [round(low, 1), round(high, 1)]}


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share, in percent (Wilson 1927).

    >>> [round(x, 1) for x in wilson(95, 100)]
    [88.8, 97.8]
    """
    share, z2 = right / count, z * z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * (share * (1 - share) / count + z2 / (4 * count)) ** 0.5
    return 100 * (middle - half), 100 * (middle + half)
