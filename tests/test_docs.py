"""The README and the pages of docs/ lead to what exists, and say it in plain English.

Their Python examples run as doctests.
"""

import importlib
import re
import tomllib
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import hessdensity as hd

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [README, *PAGES]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

# Turns that a reader has to read twice, and spellings that JAX does not have.
CLIPPED = [
    r"\b(is|are|be) none\b",
    r"(?<!there )\b(is|are|be) no (?!longer)",
    r", for (it|they) (is|are)\b",
    r"\bgo(es|ing)? on\b",
    r"\bwent on\b",
    r"\bso for\b",
    r"\bas (it|they) should\b",
    r"\bone [\w-]+ an? (probe|batch|step|device|process|checkpoint|part|page|test)\b",
    r"\b(products?|vectors?|probes?|bytes) an? (pass|probe|step|device|process|checkpoint)\b",
    r"\bis answered with\b",
    r"[a-z](al|on|or|im|er)is(e|es|ed|ing|ation)\b",
    r"\b(neighbour|colour|behaviour|licence|centre|favour)",
]
PRIVATE = [r"(^|[\s'\"`(])/(work|home|root|tmp|Users)/", r"\bfile://"]


def name(path):
    return str(path.relative_to(ROOT))


def prose(path):
    """The text without its blocks of code and its links' targets."""
    return LINK.sub("]", FENCE.sub("", path.read_text()))


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_a_relative_link_leads_to_what_exists(path):
    for target in LINK.findall(path.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{name(path)} links to {target}"
        assert page.is_relative_to(ROOT), f"{name(path)} links out of the repository: {target}"
        assert not anchor or anchor in anchors(page), f"{name(path)}: no heading for {target}"


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_a_public_name_that_is_mentioned_exists(path):
    for dotted in re.findall(r"(?<![\w.])hd((?:\.[A-Za-z]\w*)+)", path.read_text()):
        first, *others = dotted.strip(".").split(".")
        assert hasattr(hd, first), f"{name(path)} mentions hd.{first}"
        found = getattr(hd, first)
        for other in others:
            assert hasattr(found, other), f"{name(path)} mentions hd{dotted}"
            found = getattr(found, other)


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_a_module_that_is_mentioned_exists(path):
    for dotted in re.findall(r"`hessdensity((?:\.[a-z]\w*)+)`", path.read_text()):
        parts = f"hessdensity{dotted}".split(".")
        try:
            importlib.import_module(".".join(parts))
        except ModuleNotFoundError:
            module = importlib.import_module(".".join(parts[:-1]))
            assert hasattr(module, parts[-1]), f"{name(path)} mentions hessdensity{dotted}"


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_a_source_file_that_is_mentioned_exists(path):
    for file in re.findall(r"`([a-z_]+/[\w/]*(?:\.py)?)`", path.read_text()):
        assert (ROOT / "hessdensity" / file).exists() or (ROOT / file).exists(), file
    for module in re.findall(r"python -m (benchmarks[\w.]*)", path.read_text()):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_index_links_every_page_and_the_readme_leads_to_it():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(index.read_text())}
    assert {page for page in PAGES if page != index} <= linked
    assert "docs/index.md" in LINK.findall(README.read_text())


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 8000


def test_the_readme_has_one_test_command():
    (block,) = re.findall(
        r"^<!-- test command -->\n```bash\n(.+?)\n```$", README.read_text(), re.MULTILINE
    )
    assert "\n" not in block
    assert block.endswith(".venv/bin/pytest")
    for group in re.findall(r"--group (\w+)", block):
        assert group in PROJECT["dependency-groups"]


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_an_extra_that_is_mentioned_exists(path):
    extras = PROJECT["project"]["optional-dependencies"]
    for listed in re.findall(r"pip install[^\n]*'\.\[([\w,]+)\]'", path.read_text()):
        assert set(listed.split(",")) <= set(extras)


def test_the_installation_page_has_every_extra():
    text = (ROOT / "docs" / "installation.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_no_line_holds_a_clipped_turn_or_a_path_of_one_machine(path):
    lines = prose(path).splitlines()
    for turn, line in product(CLIPPED, lines):
        assert not re.search(turn, line, re.IGNORECASE), f"{name(path)}: {line}"
    for turn, line in product(PRIVATE, path.read_text().splitlines()):
        assert not re.search(turn, line), f"{name(path)}: {line}"


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_what_stands_in_questions_alone(path):
    sentences = re.split(r"(?<=[.!?:])\s|\n\n|\|", prose(path))
    for sentence in sentences:
        asks = sentence.rstrip(" *`)").endswith("?")
        assert asks or not re.search(r"\bwhat\b", sentence, re.IGNORECASE), sentence


def test_the_summary_of_the_readme_has_the_lines_of_a_summary(key):
    def loss(weights, batch):
        inputs, targets = batch
        return jnp.mean((jnp.tanh(inputs @ weights) - targets) ** 2)

    inputs = jax.random.normal(key, (50, 30))
    hessian = hd.Hessian(loss, jnp.ones(30) / 9, hd.batches((inputs, jnp.ones(50)), 25))
    settings = {"num_steps": 5, "deflation_steps": 20, "progress": False}
    printed = str(hd.spectral_density(hessian, key, **settings))
    (shown,) = re.findall(r"^```text\n(.+?)\n```$", README.read_text(), re.MULTILINE | re.DOTALL)

    def labels(summary):
        return [re.split(r"\s{2,}| in ±", line.strip())[0] for line in summary.splitlines()[1:]]

    assert labels(shown) == labels(printed)
    assert shown.startswith("Spectral density of a Hessian, n = 1,210\n")
