# SPDX-License-Identifier: Apache-2.0
"""Arrays in files, read and never mapped: what NumPy gives, or one line where the file was cut or is none."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.data.numbers import Numbers
from hybridlm.errors import DataError

pytestmark = pytest.mark.quick
VALUES = np.arange(1000, dtype=np.int64) ** 2


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("numbers") / "x.int64"
    path.write_bytes(b"header" + VALUES.tobytes())
    return path


@given(st.integers(0, 999), st.integers(0, 1000), st.lists(st.integers(0, 999)), st.integers(-1000, 999))
def test_as_an_array(file, start, stop, where, one):
    stop = max(start, stop)
    numbers = Numbers(file, "int64", header=6)
    np.testing.assert_array_equal(numbers[start:stop], VALUES[start:stop])
    np.testing.assert_array_equal(numbers[np.array(where, np.int64)], VALUES[np.array(where, np.int64)])
    assert numbers[one] == VALUES[one]
    part = Numbers(file, "int64", start, stop - start, header=6)
    assert len(part) == stop - start and part.tolist() == VALUES[start:stop].tolist()
    np.testing.assert_array_equal(np.asarray(part), VALUES[start:stop])


def test_a_cut_file_and_a_pipe_are_one_line(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(VALUES.tobytes())
    numbers = Numbers(path, "int64")
    os.truncate(path, 4000)
    for where in (slice(None), 999, np.array([0, 600])):
        with pytest.raises(DataError, match=f"{path} was cut while it was read"):
            numbers[where]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe or a device, no file"):
        Numbers(tmp_path / "pipe", "int64")
