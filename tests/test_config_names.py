# SPDX-License-Identifier: Apache-2.0
"""Names of configs are found without executing any file but the one that is asked for."""

import pytest

from hybridlm.config.find import config_names, load_config, pod_names
from hybridlm.errors import ConfigError

pytestmark = pytest.mark.quick


def test_listing_names_executes_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    body = f"open({str(tmp_path / 'executed')!r}, 'w')\nSIZES = {{'s': 1, **{{}}}}\nPODS: dict = {{'s:v5e:2x2': 3}}\n"
    (folder / "mine.py").write_text(body + "def config(size): return size\n")
    (folder / "broken.py").write_text("SIZES = {'x': \ndef config(size):\n")
    monkeypatch.chdir(tmp_path)
    assert "mine:s" in config_names() and "mine:s:v5e:2x2" in pod_names()
    with pytest.raises(ConfigError, match="no config named 'mime'"):
        load_config("mime")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ConfigError, match=r"broken.py: SyntaxError"):
        load_config("broken:x")
