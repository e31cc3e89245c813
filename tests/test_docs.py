"""The documentation: its length, links, commands and names agree with the code."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer

from app.cli import app
from app.core.settings import Settings
from dcar_core.util import errors
from tests.support.commands import run
from tests.support.paths import ROOT
from tests.support.shown import assert_text, shown_blocks

PLACES = (
    "*.md",
    "docs/**/*.md",
    "examples/*/README.md",
    "clients/python/README.md",
    "plugins/**/README.md",
)
PAGES = sorted({page for place in PLACES for page in ROOT.glob(place)})
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
# of letters or digits
MAX_WORDS = 1500
MAX_BENCHMARKS = 5000
SHOWS = [
    "README.md",
    "docs/tutorial.md",
    *(f"docs/how-to/{path.name}" for path in (ROOT / "docs/how-to").glob("*.md")),
]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """The page without code blocks and comments."""
    text = re.sub(r"<!--.*?-->", "", TEXTS[page.resolve()], flags=re.DOTALL)
    return re.sub(
        r"^```.*?^```",
        "",
        text,
        flags=re.DOTALL | re.MULTILINE,
    )


def links(page: Path) -> list[str]:
    return re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def shell_commands(page: Path) -> Iterator[list[str]]:
    """Words of every line in the page's shell blocks, and of inline code that starts
    with `dcar` or `python -m`.
    """
    blocks = re.findall(r"^```sh\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE)
    lines = [
        line for block in blocks for line in block.replace("\\\n", " ").splitlines()
    ]
    for line in [*lines, *re.findall(r"`((?:dcar|python -m) [^`\n]*)`", prose(page))]:
        # half of a quoted text, as in a curl command over two lines
        with suppress(ValueError):
            words = shlex.split(line, comments=True)
            if words:
                yield words


def options_of(*names: str) -> set[str]:
    """The options of a dcar command; those of a group, if the next word names none of
    its commands.
    """
    command: Any = typer.main.get_command(app)
    for name in names:
        if not hasattr(command, "commands"):
            break
        if name not in command.commands:
            if re.fullmatch(r"[a-z][a-z-]+", name):
                return set()
            return {"--help", "--version"}
        command = command.commands[name]
    return {"--help", "--version"} | {
        o for p in command.params for o in [*p.opts, *p.secondary_opts]
    }


def unknown_options(words: list[str]) -> list[str]:
    """Return what is wrong with a documented command: its name, or options that it
    lacks.
    """
    if "app.cli" in words[:8]:  # python -m app.cli
        words = ["dcar", *words[words.index("app.cli") + 1 :]]
    given = [
        word.partition("=")[0]
        for word in words
        if re.fullmatch(r"--[a-z][a-z-]*(=.*)?|-[a-z]", word)
    ]
    if words[0] == "dcar":
        known = options_of(*words[1:])
        if known:
            return [option for option in given if option not in known]
        return words[:3]
    if words[:3] == ["python", "-m", "index_jobs.rebuild"]:
        return [
            option
            for option in given
            if option not in options_of("index", "build") | {"-m"}
        ]
    if words[0] == "python" and words[1:2] and words[1].endswith(".py"):
        source = text_of(words[1]) if (ROOT / words[1]).is_file() else ""
        if source:
            return [option for option in given if not re.search(rf"{option}\b", source)]
        return words[:2]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
        return [
            word
            for word in words[1:]
            if re.fullmatch("[a-z-]+", word) and word not in targets
        ]
    return []


def test_pages_are_short() -> None:
    counts = {
        name(page): len(re.findall(r"\S*\w\S*", text)) for page, text in TEXTS.items()
    }
    del counts["CHANGELOG.md"]
    for page, count in counts.items():
        limit = MAX_BENCHMARKS if page == "docs/benchmarks.md" else MAX_WORDS
        assert count <= limit, f"{page} has {count} words; the limit is {limit}"


@pytest.mark.parametrize("page", SHOWS)
def test_every_command_is_followed_by_what_it_prints(page: str) -> None:
    """Or its block says what it needs that a test lacks; `tests/e2e` compares the
    outputs with real ones.
    """
    for block in shown_blocks(page):
        assert block.output or block.needs or block.is_silent, (
            f"{page} shows no output of {block.lines}"
        )


def test_relative_links_resolve() -> None:
    for page in PAGES:
        for link in links(page):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), (
                f"{name(page)} links to {link}, which does not exist"
            )
            if anchor:
                assert anchor in anchors(target), (
                    f"{name(page)} links to {link}: no such heading"
                )


def test_every_page_is_reachable_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {
            (page.parent / link.partition("#")[0]).resolve()
            for link in links(page)
            if link.partition("#")[0]
        }
        waiting += [
            target
            for target in targets
            if target.suffix == ".md" and target not in reached
        ]
    orphans = [name(page) for page in PAGES if page not in reached]
    assert not orphans, f"no path leads from README.md to {orphans}"


def test_every_image_of_the_documentation_is_used() -> None:
    used: set[Path] = set()
    for page in PAGES:
        used.update((page.parent / link).resolve() for link in links(page))
    assert set((ROOT / "docs").rglob("*.webp")) <= used


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if ROOT / "plugins" not in page.parents],
    ids=name,
)
@pytest.mark.slow
def test_documented_commands_and_options_exist(page: Path) -> None:
    for words in shell_commands(page):
        if unknown := unknown_options(words):
            pytest.fail(
                f"{name(page)}: `{shlex.join(words)}`: {unknown} does not exist"
            )


def test_named_source_files_exist() -> None:
    for page in PAGES:
        folders = (
            "app|index_jobs|dcar_core|clients|docs|tests|benchmarks|plugins|scripts"
            "|examples"
        )
        for path in re.findall(rf"`((?:{folders})/[\w/.-]+)`", prose(page)):
            assert (ROOT / path).exists(), f"{name(page)} names {path}"


def test_named_variables_exist() -> None:
    """Every DCAR_* variable of the documentation is a setting, or is read somewhere in
    the code.
    """
    sources = [
        *ROOT.glob("docker-compose.yml"),
        ROOT / "Makefile",
        ROOT / ".ci" / "run",
    ]
    for folder in ("app", "index_jobs", "dcar_core", "plugins", "tests"):
        sources += (
            path for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)
        )
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    known = {f"DCAR_{field.upper()}" for field in Settings.model_fields}
    for page, text in TEXTS.items():
        if page.name == "CHANGELOG.md":
            named = set()
        else:
            named = {*re.findall(r"\bDCAR_[A-Z_]+[A-Z]\b", text)}
        assert [each for each in named - known if each not in code] == [], name(page)


def test_the_generated_reference_is_up_to_date() -> None:
    """The script needs neither PyTorch nor FAISS."""
    script = ROOT / "scripts" / "generate_reference.py"
    code = (
        "import runpy, sys; sys.argv = ['x', '--check']\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "finally: assert not {'torch', 'faiss'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_and_explanations_are_complete() -> None:
    from app.main import create_app
    from dcar_core.model.methods import METHODS
    from index_jobs.engines.faiss.build import NAMED, choose_kinds

    routes = create_app(Settings(index=ROOT)).openapi()["paths"]
    assert len(routes) > 8
    routes = [
        path for path in routes if not path.startswith("/collections/{collection}/")
    ]
    page = text_of("docs/reference/http-api.md")
    assert [path for path in routes if f"{path}`" not in page] == []
    page = text_of("docs/explanation/method.md")
    assert [name for name in METHODS if f"`{name}`" not in page] == []
    page = text_of("docs/explanation/index-kinds.md")
    count = 1_000_000
    for name in (
        name for name in NAMED if name != "auto" and not name.startswith("gpu-")
    ):
        (choice,) = choose_kinds(name, count, 512)
        row = (
            f"| `{name}` | `{choice.factory.replace('IVF4000', 'IVF<n>')}` |"
            f" {choice.bytes // count} |"
        )
        assert row in page, f"docs/explanation/index-kinds.md lacks {row}"
    listed = {
        int(code)
        for code in re.findall(
            r"^\| (\d+) \|",
            text_of("docs/reference/exit-codes.md"),
            re.MULTILINE,
        )
    }
    classes = [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.DcarError)
    ]
    assert {each.exit_code for each in classes} <= listed


@pytest.mark.slow
def test_python_examples_run() -> None:
    """The Python block of the README prints what it shows; those that need a service
    are only compiled.
    """
    text = text_of("README.md")
    ((code, shown),) = re.findall(
        r"^```python\n(.*?)^```\n\n```text\n(.*?)^```",
        text,
        re.DOTALL | re.MULTILINE,
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert_text(shown, done.stdout)
    for page, text in TEXTS.items():
        for block in re.findall(
            r"^```python\n(.*?)^```",
            text,
            re.DOTALL | re.MULTILINE,
        ):
            compile(block, name(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
