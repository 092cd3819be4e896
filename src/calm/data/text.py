"""What a text may hold."""


def half_character(text: str) -> int | None:
    """Where a text holds half of a surrogate pair, which JSON can say and no tokenizer takes; else None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
