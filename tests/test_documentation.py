"""Every Python and shell block of README, CONTRIBUTING and docs runs; see ``documentation.py``."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from pathlib import Path

import parity
import pytest
import torch

markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")

from documentation import (  # noqa: E402
    REPOSITORY,
    DocumentationError,
    Page,
    blocks,
    commands,
    compare,
    run_page,
)

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
#: What a page imports beyond the package and torch, as the marker of its test names it.
MARKS = {"export.md": pytest.mark.export_runtime("openvino")}
#: Seconds after which a page has failed: one that hangs must not hang the tests.
PATIENCE = 300


def name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def runs(page: Path) -> bool:
    return any(block.not_run is None for block in blocks(page.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def trunk_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights of all trunks: ImageNet's if they are at hand, else random ones.

    AlexNet's are in the package, and so always ImageNet's.
    """
    nets = ("vgg", "squeeze")
    shared = REPOSITORY.parent / "shared" / "weights"
    folder = Path(os.environ.get("LPIPS_FAST_WEIGHTS", shared))
    if all((folder / f"{net}.features.pth").is_file() for net in nets):
        return folder
    folder = tmp_path_factory.mktemp("random_weights")
    for net in nets:
        torch.save(parity.trunk_weights(net), folder / f"{net}.features.pth")
    return folder


@pytest.fixture(scope="session")
def server() -> multiprocessing.context.ForkServerContext:
    """Starts a process a page, each a fork of one that has loaded torch and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lpips_fast.cli", "documentation"])
    return context


def report(errors, *arguments) -> None:
    """The whole of a page's process: what went wrong, or nothing, goes through the pipe."""
    try:
        run_page(*arguments)
    except BaseException:
        errors.send(traceback.format_exc())
    else:
        errors.send("")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name(page), marks=MARKS.get(page.name, ()))
        for page in PAGES
        if runs(page)
    ],
)
def test_page_runs(page, server, trunk_weights, tmp_path):
    received, errors = server.Pipe(duplex=False)
    process = server.Process(target=report, args=(errors, page, tmp_path, trunk_weights))
    process.start()
    errors.close()
    if not received.poll(PATIENCE):
        process.kill()
        pytest.fail(f"still runs after {PATIENCE} s")
    try:
        error = received.recv()
    except EOFError:
        error = "its process died"
    process.join()
    if error:
        pytest.fail(error, pytrace=False)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_does_not_run_says_why(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.not_run is not None:
            assert len(block.not_run.split()) >= 2, f"line {block.line}: not run, and no reason"


@pytest.mark.parametrize("page", PAGES[:2], ids=name)
def test_links_lead_somewhere(page):
    """Those of docs are checked by ``mkdocs build --strict``."""
    for token in (
        markdown_it.MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))
    ):
        for inline in token.children or ():
            link = str(inline.attrs.get("href") or inline.attrs.get("src") or "")
            if link and "://" not in link and not link.startswith("#"):
                assert (page.parent / link.split("#")[0]).exists(), link


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


class TestTheTestItself:
    """A page that is wrong fails."""

    def run(self, text: str, folder: Path) -> None:
        page = folder / "page.md"
        page.write_text(text)
        Page(page).run()

    def test_blocks_share_what_they_define(self, tmp_path):
        self.run("<!-- setup\nx = 1\n-->\n\n```python\nassert x == 1; y = 2\n```\n"
                 "```python\nassert y == 2\n```\n", tmp_path)  # fmt: skip

    @pytest.mark.parametrize(
        "block",
        ["```python\nno_such_name\n```", "```bash\nfalse\n```", "```bash\nlpips-fast x y\n```",
         "```bash\necho 1.1\n```\n\n```text\n1.2\n```", "```bash\necho a\n```\n\n```text\nb\n```"],
    )  # fmt: skip
    def test_a_wrong_block_fails_and_says_where(self, block, tmp_path, capsys):
        with pytest.raises(DocumentationError, match=r"page\.md, line \d"):
            self.run(block, tmp_path)

    def test_a_marked_block_does_not_run(self, tmp_path):
        self.run("<!-- not run: it would fail -->\n```python\nno_such_name\n```", tmp_path)

    @pytest.mark.parametrize(
        "text", ["```ruby\n1\n```", "<!-- not run: what? -->", "a\n\n    code"]
    )
    def test_what_would_be_passed_over_in_silence_fails(self, text):
        with pytest.raises(DocumentationError):
            blocks(text)

    def test_commands_over_several_lines(self):
        code = "# a comment\necho a \\\n  b\necho 'c\nd'  # of two lines\n"
        assert [c.split("#")[0].split() for c in commands(code)] == [
            ["echo", "a", "b"],
            ["echo", "'c", "d'"],
        ]

    def test_numbers_may_differ_by_rounding(self):
        compare("d 0.72188 in 3 ways", "d  0.7219\nin 3 ways")
        with pytest.raises(DocumentationError):
            compare("0.7219", "0.7319")
