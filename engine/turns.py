"""What all samplers share: how a turn is written into a response."""


def is_greedy(response, cfg) -> bool:
    """Whether its tokens are the likeliest ones, or drawn."""
    return response.greedy or cfg.temperature == 0


def turn_room(response, cfg) -> int:
    """Tokens that the response's next turn may have."""
    return min(cfg.max_turn_tokens, cfg.max_tokens - response.own_length)


def add_turn(response, ids: list[int], logprobs: list[float], tokenizer):
    """Append a sampled turn; its text leaves out the end-of-turn token."""
    response.append(ids, logprobs)
    response.turn_text = tokenizer.decode(
        [token for token in ids if token != tokenizer.eos_token_id]
    )
