"""A question's pictures as the vision tower takes them, within the limits of a run."""

from torch import Tensor

from engine.text import message_ids, message_texts, most_tokens, template_pieces
from files.images import image_size, open_image
from files.terminal import visible

MOST_RATIO = 200  # of a picture's sides, by Qwen's processor


def limits(processor, cfg) -> dict[str, int]:
    """The least and the most pixels of a picture: the run's, or the checkpoint's own."""
    own = processor.image_processor.size
    return {
        "min_pixels": cfg.min_pixels or own["shortest_edge"],
        "max_pixels": cfg.max_pixels or own["longest_edge"],
    }


def preprocessed(processor, images: list, cfg) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """(pixel values, grid (n, 3) in patches, tokens of each picture); (None, None, []) of none.

    Raises ValueError when a picture cannot be read.
    """
    if not images:
        return None, None, []
    preprocess = processor.image_processor
    pictures = [open_image(image) for image in images]
    vision = preprocess(images=pictures, return_tensors="pt", **limits(processor, cfg))
    grid = vision["image_grid_thw"]
    return vision["pixel_values"], grid, (grid.prod(-1) // preprocess.merge_size**2).tolist()


def most_slots(processor, cfg) -> int:
    """The most tokens that a picture can take. A very long one can exceed the limit of pixels, as
    its short side has one token at least."""
    preprocess = processor.image_processor
    side = preprocess.patch_size * preprocess.merge_size  # pixels
    return max(limits(processor, cfg)["max_pixels"] // side**2, MOST_RATIO)


def prompt_length(processor, question, cfg) -> int:
    """Tokens of a question's prompt; of its pictures only the size is read."""
    preprocess = processor.image_processor
    slots = []
    for image in question.images:
        width, height = image_size(image)
        patches = preprocess.get_number_of_image_patches(height, width, limits(processor, cfg))
        slots.append(patches // preprocess.merge_size**2)
    texts = message_texts(cfg.instructions, question.problem)
    return len(message_ids(processor, texts, slots)) + len(question.opening)


def readable(question) -> bool:
    """Whether all pictures of a question can be used; says which one cannot."""
    try:
        for image in question.images:
            width, height = open_image(image).size
            if max(width, height) > MOST_RATIO * min(width, height):
                raise ValueError(f"cannot use the image {image}: {width} x {height} is a line")
    except ValueError as error:
        print(visible(f"left out question {question.id}: {error}"), flush=True)
        return False
    return True


def too_long(processor, question, cfg) -> bool:
    """Whether the prompt has more tokens than `max_prompt_tokens`, which is 0 for no limit.

    Not where a picture cannot be read: `readable` leaves that question out.
    """
    try:
        return 0 < cfg.max_prompt_tokens < prompt_length(processor, question, cfg)
    except ValueError:
        return False


def without_long(processor, questions: list, cfg, say=print) -> list:
    """Those that are not too long to train on; says which are left out.

    Raises ValueError where none is left.
    """
    if not cfg.max_prompt_tokens:
        return questions
    frames = {}  # {number of pictures: the most tokens that they and the template can take}

    def may_be_long(question) -> bool:  # of a million questions few need a look at their pictures
        count = len(question.images)
        if count not in frames:
            template = sum(map(most_tokens, template_pieces(processor, count)))
            frames[count] = template + count * most_slots(processor, cfg)
        texts = message_texts(cfg.instructions, question.problem)
        length = frames[count] + len(question.opening) + sum(map(most_tokens, texts))
        return length > cfg.max_prompt_tokens

    left_out = [q for q in questions if may_be_long(q) and too_long(processor, q, cfg)]
    if left_out:
        names = ", ".join(str(question.id) for question in left_out[:20])
        more = ", …" if len(left_out) > 20 else ""
        say(
            f"left out {len(left_out)} of {len(questions)} questions, whose prompts have more than "
            f"--max-prompt-tokens {cfg.max_prompt_tokens}: {names}{more}"
        )
    gone = {id(question) for question in left_out}
    kept = [question for question in questions if id(question) not in gone]
    if not kept:
        raise ValueError(
            f"no question has a prompt of at most --max-prompt-tokens {cfg.max_prompt_tokens}: "
            "raise it, or lower --max-pixels"
        )
    return kept
