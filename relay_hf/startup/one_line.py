"""Messages of libraries, for a sentence of ours."""


def one_line(error: object) -> str:
    """The text of an error without line breaks; the name of its class if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
