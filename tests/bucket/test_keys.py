from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_prefect.api.models import ImageRequest
from flux_prefect.bucket.keys import check_key_template, clean_prefix, object_key, record_key

FINGERPRINT = "0123456789abcdef" * 2
REQUEST = ImageRequest(prompt="a lighthouse", seed=7)


def test_the_default_key_is_the_fingerprint_and_the_index() -> None:
    """Anybody can compute where an image is."""
    assert object_key(REQUEST, FINGERPRINT, 0) == f"{FINGERPRINT}-0.jpg"
    png = REQUEST.model_copy(update={"output_format": "png"})
    assert object_key(png, FINGERPRINT, 3, prefix="team/images") == f"team/images/{FINGERPRINT}-3.png"


def test_every_image_of_a_request_has_a_key_of_its_own() -> None:
    """Four images, four keys."""
    assert len({object_key(REQUEST, FINGERPRINT, index) for index in range(4)}) == 4


def test_a_template_may_use_what_distinguishes_images() -> None:
    """Seed, aspect ratio and model come out without characters that mean something in a path or a URL."""
    template = check_key_template("{model}/{aspect_ratio}/{seed}/{fingerprint}/{index}.{extension}")
    key = object_key(REQUEST, FINGERPRINT, 1, template=template)
    assert key == f"flux-kontext-max-text-to-image/16x9/7/{FINGERPRINT}/1.jpg"


@pytest.mark.parametrize(
    "template",
    [
        "{fingerprint}{index}",
        "{index}/{fingerprint}",
        "year=2026/{{raw}}/{fingerprint}_{index}",
        "ünï/{fingerprint}-{index}",
    ],
)
def test_a_good_template_is_returned_as_it_is(template: str) -> None:
    """What keeps different images apart is accepted."""
    assert check_key_template(template) == template


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{fingerprint}", "lacks {index}"),
        ("{index}", "lacks {fingerprint}"),
        ("", "lacks {fingerprint}"),
        ("{{fingerprint}}-{index}", "lacks {fingerprint}"),
        ("{fingerprint}-{index}-{prompt}", "unknown field 'prompt'"),
        ("{fingerprint}-{index}-{}", "unknown field ''"),
        ("{fingerprint}-{index}-{0}", "unknown field '0'"),
        ("{fingerprint.__class__}-{fingerprint}-{index}", "unknown field 'fingerprint.__class__'"),
        ("{fingerprint[0]}-{index}", "unknown field"),
        ("{fingerprint:.8}-{index}", "formats a field"),
        ("{fingerprint}-{index:{prompt}}", "formats a field"),
        ("{fingerprint!r}-{index}", "formats a field"),
        ("{fingerprint-{index}", "is broken|unknown field"),
        ("{fingerprint}-{index", "is broken"),
        ("../{fingerprint}-{index}", "dot segment"),
        ("./{fingerprint}-{index}", "dot segment"),
        ("a//{fingerprint}-{index}", "empty or dot segment"),
        ("/{fingerprint}-{index}", "empty or dot segment"),
        ("{fingerprint}-{index}/", "empty or dot segment"),
        ("{fingerprint}\n{index}", "control character"),
        ("x" * 1024 + "{fingerprint}-{index}", "longer than"),
    ],
)
def test_a_template_that_would_mix_or_lose_images_is_refused(template: str, complaint: str) -> None:
    """The error says what is wrong with it."""
    with pytest.raises(ValueError, match=complaint):
        check_key_template(template)


@pytest.mark.parametrize(
    ("prefix", "clean"),
    [
        ("", ""),
        ("/", ""),
        ("a", "a"),
        ("/a/b/", "a/b"),
        ("ünï côde/日本", "ünï côde/日本"),
        ("a..b/.hidden", "a..b/.hidden"),
    ],
)
def test_a_prefix_loses_the_slashes_at_its_ends(prefix: str, clean: str) -> None:
    """Nothing else of it is changed."""
    assert clean_prefix(prefix) == clean


@pytest.mark.parametrize("prefix", ["..", "a/../b", "../a", "a/..", ".", "a/./b", "a//b", "a\0b", "a\nb", "é" * 600])
def test_a_prefix_that_leads_elsewhere_is_refused(prefix: str) -> None:
    """Dot segments, empty segments, control characters and lengths that S3 can't take are errors."""
    with pytest.raises(ValueError, match="object key"):
        clean_prefix(prefix)


def test_the_length_of_a_key_is_counted_in_bytes() -> None:
    """The longest key allowed leaves room for its record; one character more is refused before anything is paid."""
    room = 1024 - 22 - len("records/") - len(object_key(REQUEST, FINGERPRINT, 0, prefix="x")) + 1
    longest = object_key(REQUEST, FINGERPRINT, 0, prefix="x" * room)
    assert len(record_key(longest, "f" * 64, prefix="x" * room).encode()) == 1024
    with pytest.raises(ValueError, match="longer than"):
        object_key(REQUEST, FINGERPRINT, 0, prefix="x" * (room + 1))
    with pytest.raises(ValueError, match="longer than"):
        object_key(REQUEST, FINGERPRINT, 0, prefix="é" * (room // 2 + 1))


def test_a_record_is_of_its_bytes() -> None:
    """Different bytes under one key have different records, below a prefix of their own."""
    key = object_key(REQUEST, FINGERPRINT, 0)
    assert record_key(key, "a" * 64) == f"records/{key}.aaaaaaaaaaaaaaaa.json"
    assert record_key(f"a/b/{key}", "b" * 64, prefix="a/b") == f"a/b/records/{key}.bbbbbbbbbbbbbbbb.json"


@given(prompt=st.text(min_size=1, max_size=200).filter(str.strip), seed=st.integers(1, 2**32 - 1))
def test_nothing_of_the_prompt_is_in_a_key(prompt: str, seed: int) -> None:
    """Whatever the prompt holds, the key is made of hex digits and stays under its prefix."""
    request = ImageRequest(prompt=prompt, seed=seed)
    key = object_key(request, request.fingerprint("https://api.aimlapi.com"), 0, prefix="images")
    prefix, _, rest = key.partition("/")
    name, _, end = rest.partition("-")
    assert prefix == "images"
    assert set(name) <= set(string.hexdigits)
    assert end == "0.jpg"
