# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs show runs: Python block by block, shell commands as far as their words are understood."""

import logging
from importlib.util import find_spec

import pytest

from hybridlm.config.find import load_config
from hybridlm.errors import ConfigError
from tests.docs.commands import check_shell
from tests.docs.pages import LANGUAGES, ROOT, SIZES, Block, find_blocks, pages, run_python
from tests.library.runs import write_run

WITH_RUN = ("docs/library.md",)
"""Pages whose code reads the run runs/hybrid_tiny, which is there with the parameters that it starts from."""
SMALL = {"model.d_model": 64, "model.pattern": "M-*-", "model.blocks.-.d_ff": 64}
NEEDS = {"docs/frameworks.md": "equinox"}
"""Pages whose code imports a package that only the extra dev names."""
BLOCKS = {page: find_blocks(file.read_text(encoding="utf-8")) for page, file in pages().items()}


def pages_with(language: str) -> list[str]:
    return [page for page, found in BLOCKS.items() if any(block.language == language for block in found)]


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    """Current folder and home, with the checkout's configs, and a published checkpoint by the names docs give one."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("FOLDER", "Bamba-9B"):
        (tmp_path / name).symlink_to(ROOT / "tests/golden/bamba")
    if request.node.callspec.params.get("page") in WITH_RUN:
        write_run(tmp_path / "runs/hybrid_tiny", load_config("hybrid_tiny", SMALL), steps=(200, 300))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = logging.getLogger("pallas_kernels")
    level = logger.level
    yield tmp_path
    logger.setLevel(level)


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_has_a_language(page):
    for block in BLOCKS[page]:
        assert block.language in LANGUAGES, f"{page}:{block.line}: {block.language or 'no language'}: {LANGUAGES}"


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page, folder):
    if page in NEEDS and find_spec(NEEDS[page]) is None:
        pytest.skip(f"needs {NEEDS[page]}: pip install -e '.[dev]'")
    namespace = {"__name__": "__docs__"}
    for block in BLOCKS[page]:
        if block.language == "python":
            run_python(page, block, namespace)


@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands_are_understood(page, folder):
    for block in BLOCKS[page]:
        if block.language == "sh":
            check_shell(block.code)


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
        "gcloud compute tpus queued-resources create x --acelerator-type=v5p-8",
        "gcloud compute tpus tpu-vm ssh x --command='python train.py --config hybrid_huge'",
        "srun --ntasks=2 python train.py --config hybrid_1b --mesh.fsdb=8",
        "if [ -f x ]; then make train",
        "frobnicate",
    ],
)
def test_wrong_commands_are_told(command, folder):
    with pytest.raises((AssertionError, ConfigError)):
        check_shell(command)


def test_python_blocks_share_names_and_legend_arrays():
    namespace = {}
    run_python("a.md", Block("python", 3, "twice_BTD = 2 * x_BTD"), namespace)
    run_python("a.md", Block("python", 9, "def shape(): return (x_BTD + twice_BTD).shape\nfound = shape()"), namespace)
    assert namespace["found"] == (SIZES["B"], SIZES["T"], SIZES["D"])
    with pytest.raises(NameError, match="tokenizer") as error:
        run_python("a.md", Block("python", 12, "\ntokenizer"), namespace)
    assert [(frame.path, frame.lineno) for frame in error.traceback][-1] == ("a.md", 12)
