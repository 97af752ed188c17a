"""Sections of a text that a person may have edited: what is not asked for stays as it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_hf.hub_cards.markdown import get_section, set_section

TEXT = """# Title

Hello.

## First

One.

```bash
## Second  (a comment in code)
```

### Below

Deeper.

## Second

~~~
```
# no heading
~~~

Two.
"""


def test_section_reaches_to_the_next_heading_of_its_level_and_code_holds_none() -> None:
    assert get_section(TEXT, "## Second") == "~~~\n```\n# no heading\n~~~\n\nTwo."
    assert get_section(TEXT, "## First").endswith("### Below\n\nDeeper.")
    assert get_section(TEXT, "### Below") == "Deeper."
    assert get_section(TEXT, "## Third") == ""


@pytest.mark.parametrize(
    "code",
    ["````markdown\n```\n## Second\n```\n## Second\n````", "```\n```python\n## Second\n```", "~~~\n## Second\n~~~~"],
)
def test_fence_ends_with_its_like(code: str) -> None:
    text = f"## First\n\n{code}\n\n## Second\n\nTwo.\n"
    assert get_section(text, "## First") == code
    assert get_section(text, "## Second") == "Two."


def test_replaced_section_leaves_the_others() -> None:
    changed = set_section(TEXT, "### Below", "New.")
    assert changed == TEXT.replace("Deeper.", "New.")


def test_empty_body_removes_the_heading() -> None:
    changed = set_section(TEXT, "## First", "")
    assert changed == TEXT[: TEXT.index("## First")] + TEXT[TEXT.index("## Second\n") :]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ((), TEXT + "\n## New\n\nText.\n"),
        (["## Third", "## Second"], TEXT.replace("## Second\n", "## New\n\nText.\n\n## Second\n")),
        (["## Second", "## First"], TEXT.replace("## First\n", "## New\n\nText.\n\n## First\n")),
    ],
)
def test_new_section_goes_before_the_first_that_exists(before: list[str], expected: str) -> None:
    assert set_section(TEXT, "## New", "Text.", before=before) == expected


lines = st.lists(
    st.sampled_from(["# a", "## b", "## c", "### d", "```", "~~~", "text", "", "    code", "##b", "- item"]),
    max_size=20,
)


@given(lines, st.sampled_from(["## b", "## new", "### d"]), st.sampled_from(["", "one", "one\n\n- two"]))
def test_section_that_was_set_is_read_and_nothing_else_changes(given_lines: list[str], heading: str, body: str) -> None:
    text = "\n".join(given_lines)
    closed = all(text.count(fence) % 2 == 0 for fence in ("```", "~~~")) and not ("```" in text and "~~~" in text)
    changed = set_section(text, heading, body)
    if closed:  # behind an open fence all is code
        assert get_section(changed, heading) == body or (not body and given_lines.count(heading) > 1)
        assert set_section(changed, heading, body) == changed or not body
    remaining = [line for line in changed.splitlines() if line.strip()]
    pieces = iter(line for line in given_lines if line.strip())
    own = {heading, *body.splitlines()}
    assert all(line in own or line in pieces for line in remaining), "other lines stay in their order"
