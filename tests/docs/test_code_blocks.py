# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs show runs: Python block by block, shell commands as far as their words are understood."""

import pytest

from hybridlm.errors import ConfigError
from tests.docs.commands import check_shell
from tests.docs.pages import LANGUAGES, ROOT, find_blocks, pages, run_python

BLOCKS = {page: find_blocks(file.read_text(encoding="utf-8")) for page, file in pages().items()}
PREAMBLES = {
    "docs/context.md": "import jax; mesh = jax.make_mesh((2, 4), ('data', 'context'))",
    "docs/data.md": """
from pathlib import Path
import hybridlm
Path("texts").mkdir()
for i in range(20):
    Path(f"texts/{i}.txt").write_text("It was a dark and stormy night. " * 20)
config = hybridlm.load_config("hybrid_tiny", ["--data.path=texts/*.txt", "--data.seq_len=32", "--data.batch_size=8"])
""",
    "docs/families.md": "import hybridlm; mesh = hybridlm.make_mesh(hybridlm.MeshConfig(fsdp=2))",
}
"""What a page's Python blocks may take as given beside arrays named by the legend, which pages.py makes."""


def pages_with(language: str) -> list[str]:
    return [page for page, found in BLOCKS.items() if any(block.language == language for block in found)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Current folder with the checkout's configs, and a published checkpoint under the names that the docs give one."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("FOLDER", "Bamba-9B"):
        (tmp_path / name).symlink_to(ROOT / "tests/golden/bamba")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_has_a_language(page):
    for block in BLOCKS[page]:
        assert block.language in LANGUAGES, f"{page}:{block.line}: {block.language or 'no language'}: {LANGUAGES}"


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page, folder):
    namespace = {"__name__": "__docs__"}
    exec(PREAMBLES.get(page, ""), namespace)
    for block in BLOCKS[page]:
        if block.language == "python":
            run_python(page, block, namespace)


@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands_are_understood(page, folder):
    for block in BLOCKS[page]:
        if block.language == "sh":
            check_shell(block.code)


def test_preambles_belong_to_pages():
    assert set(PREAMBLES) <= set(pages_with("python"))


@pytest.mark.parametrize("text", ["So:\n\n    f()\n", "```\nf()\n```", "1. a\n\n        f()", "~~~bash\nls\n~~~"])
def test_blocks_without_a_language_are_found(text):
    assert [block.language in LANGUAGES for block in find_blocks(text)] == [False]


def test_blocks_are_read_whole():
    text = "- item\n\n    more of it\n\n    ```python\n    if x:\n\n        f()\n    ```\n\nSo:\n\n```text\na\n```\n"
    assert [(b.language, b.line, b.code) for b in find_blocks(text)] == [
        ("python", 6, "if x:\n\n    f()"),
        ("text", 14, "a"),
    ]


@pytest.mark.parametrize(
    "command",
    [
        "python train.py --config hybrid_tiny --model.d_modl=64",
        "python train.py --config hybrid_huge",
        "python train.py --model.d_model=64",
        "hybridlm generate --runs x",
        "hybridlm generate --run x --max-new-tokens many",
        "hybridlm convert from-hf FOLDER",
        "hybridlm transmute",
        "python -m pallas_kernels.bench no_such_op",
        "python -m pytest tests/no_such_file.py",
        "python no_such_script.py",
        "make train && make tets",
        "make CONFG=hybrid_tiny train",
        "pip install -e '.[tpuu]'",
        "pip install no_such_package",
        "cd no_such_folder",
        "frobnicate",
    ],
)
def test_wrong_commands_are_told(command, folder):
    with pytest.raises((AssertionError, ConfigError)):
        check_shell(command)
