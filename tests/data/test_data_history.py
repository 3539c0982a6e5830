# SPDX-License-Identifier: Apache-2.0
"""The batch of step n is a function of (seed, the run's list of data, n): mixtures, changes, windows left out."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.data import host_rows, make_loader, open_corpus
from hybridlm.data.history import from_json
from hybridlm.data.mixture import Mixture, shares
from hybridlm.errors import ConfigError, DataError
from tests.data.support import check_equal, join, pairs_of, take


@pytest.fixture
def sources(tmp_path):
    """Three files whose texts say which one they are of."""
    for name, n in (("a", 40), ("b", 90), ("c", 15)):
        lines = [json.dumps({"text": f"{name}{i}" + name * (i * 7 % 60)}) + "\n" for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return [str(tmp_path / f"{name}.jsonl") for name in "abc"]


@pytest.fixture
def mixed(config, sources):
    """Makes a config of a mixture of them."""
    return lambda *weights, **fields: config(path=tuple(sources[: len(weights)]), weights=weights, **fields)


def source_of(row) -> str:
    letters = [chr(t) for t in row["tokens"] if chr(t) in "abc"]
    assert len(set(letters)) == 1, "rows do not mix sources"
    return letters[0]


def rows_of(batches):
    return [{field: batch[field][i] for field in batch} for batch in batches for i in range(len(batch["tokens"]))]


@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    limits=st.lists(st.one_of(st.none(), st.integers(0, 40)), min_size=5, max_size=5),
)
def test_a_mixture_deals_each_row_once_in_its_shares(weights, limits):
    limits = limits[: len(weights)]
    mixture = Mixture(weights, limits)
    n = min(mixture.length if mixture.length is not None else 10**9, 300)
    seen = [[] for _ in weights]
    for row in range(n):
        assert mixture.counts(row) == tuple(map(len, seen))
        source, number = mixture.at(row)
        seen[source].append(number)
        if not any(limit is not None for limit in limits):
            for got, weight in zip(seen, weights):
                assert abs(len(got) - (row + 1) * weight / sum(weights)) < len(weights)
    for numbers, limit in zip(seen, limits):
        assert numbers == list(range(len(numbers))) and (limit is None or len(numbers) <= limit)
    if mixture.length is not None:
        assert mixture.length == sum(limits)
        assert mixture.length > 300 or [len(numbers) for numbers in seen] == list(limits)


def test_shares_sum_up_and_a_weight_that_vanishes_is_told():
    assert shares([0.7, 0.2, 0.1]) == [70_000, 20_000, 10_000]
    assert sum(shares([1 / 3] * 3)) == 100_000
    with pytest.raises(ConfigError, match=r"data.weights \(1e-09\) is less than 1/100000 of their sum"):
        shares([1.0, 1e-9])


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_fractions_are_the_weights_and_each_source_makes_its_own_epochs(mixed, packing):
    config = mixed(0.5, 0.3, 0.2, packing=packing, val_fraction=0.0)
    corpus = open_corpus(config)
    loader = make_loader(config, seed=2, corpus=corpus)
    shares = loader.get_state()["entries"][0]["shares"]
    rows = rows_of(take(loader, 100))
    counts = {name: sum(source_of(row) == name for row in rows) for name in "abc"}
    assert all(abs(counts[name] - 400 * w) <= 1 for name, w in zip("abc", (0.5, 0.3, 0.2)))
    for name, part, share in zip("abc", corpus.parts, shares):
        own, length = [row for row in rows if source_of(row) == name], share["rows"]
        assert len(own) > 2 * length  # several passes, each over all of it in an order of its own
        passes = [sorted(row["tokens"].tobytes() for row in own[i * length : (i + 1) * length]) for i in range(2)]
        assert passes[0] == passes[1] and any((a["tokens"] != b["tokens"]).any() for a, b in zip(own, own[length:]))
        pairs = pairs_of([{k: np.stack([row[k] for row in own[:length]]) for k in ("tokens", "targets")}])
        assert len(pairs) == part.stats["train"]["pairs"]


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_hosts_and_workers_change_nothing_in_a_mixture(mixed, packing):
    config = mixed(0.6, 0.4, packing=packing)
    corpus = open_corpus(config)
    whole = take(make_loader(config, seed=1, corpus=corpus), 12)
    parts = [take(make_loader(config, seed=1, rows=host_rows(4, h, 2), corpus=corpus), 12) for h in range(2)]
    check_equal(join(parts), whole)
    spread = mixed(0.6, 0.4, packing=packing, workers=1)
    check_equal(take(make_loader(spread, seed=1, corpus=corpus), 12), whole)


def test_epochs_end_a_source_and_then_the_data(mixed):
    config = mixed(0.5, 0.5, epochs=(1, 0), val_fraction=0.0)
    rows = rows_of(take(make_loader(config), 60))
    names = "".join(source_of(row) for row in rows)
    n = names.count("a")
    assert set(names[names.rindex("a") + 1 :]) == {"b"} and n < 60
    assert len({row["tokens"].tobytes() for row in rows if source_of(row) == "a"}) == n  # none twice
    both = mixed(0.5, 0.5, epochs=(1, 2), val_fraction=0.0)
    with make_loader(both) as loader:
        with pytest.raises(DataError, match=r"data.epochs \(1, 2\) end the data at step \d+: raise them, or lower run"):
            for _ in range(10**4):
                next(loader)
        assert loader.step == len(loader)


def test_other_weights_on_resume_go_on_with_each_source(mixed):
    """Nothing is read twice within an epoch, and the list in the state makes the same batches anywhere."""
    corpus = open_corpus(mixed(0.5, 0.5, val_fraction=0.0))
    with make_loader(mixed(0.5, 0.5, val_fraction=0.0), seed=3, corpus=corpus) as loader:
        before = [next(loader) for _ in range(4)]
        state = json.loads(json.dumps(loader.get_state()))
    changed = mixed(0.25, 0.75, val_fraction=0.0)
    other = open_corpus(changed)
    with make_loader(changed, seed=3, corpus=other) as loader:
        told = loader.set_state(state)
        assert told.startswith("data ") and "x 0.5" in told and "x 0.75" in told and "\n" not in told
        after = [next(loader) for _ in range(4)]
        later = json.loads(json.dumps(loader.get_state()))
    assert [entry["step"] for entry in later["entries"]] == [0, 4]
    counts = [[source_of(row) for row in rows_of(part)].count("a") for part in (before, after)]
    assert counts == [8, 4]
    read = [row["tokens"].tobytes() for row in rows_of(before + after) if source_of(row) == "b"]
    assert len(set(read)) == len(read) == 20
    for rows in ((0, 2), (2, 4)):  # another number of hosts, from any step on, by the list alone
        with make_loader(changed, seed=3, corpus=other, rows=rows) as loader:
            assert loader.set_state(later | {"step": 5}) == ""
            expected = [{field: value[slice(*rows)] for field, value in batch.items()} for batch in after[1:]]
            check_equal([next(loader) for _ in range(3)], expected)


def test_another_batch_size_goes_on_with_the_next_row(config):
    corpus = open_corpus(config())
    rows = rows_of(take(make_loader(config(), seed=1, corpus=corpus), 20))
    with make_loader(config(), seed=1, corpus=corpus) as loader:
        for _ in range(3):
            next(loader)
        state = loader.get_state()
    with make_loader(config(batch_size=6), seed=1, corpus=corpus) as loader:
        assert loader.set_state(state) == "batch_size 4 -> 6" and loader.step == 3
        got = rows_of([next(loader) for _ in range(5)])
        state = loader.get_state()
        assert [loader.tokens_before(step) for step in (0, 2, 3, 5)] == [64 * n for n in (0, 8, 12, 24)]
    for a, b in zip(got, rows[12:], strict=False):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    with make_loader(config(), seed=1, corpus=corpus) as loader:  # and back
        assert loader.set_state(state) == "batch_size 6 -> 4"
        np.testing.assert_array_equal(next(loader)["tokens"][0], rows[12 + 30]["tokens"])


def test_another_row_length_is_an_entry(config):
    corpus = open_corpus(config())
    with make_loader(config(), corpus=corpus) as loader:
        next(loader)
        state = loader.get_state()
    with make_loader(config(seq_len=128), corpus=corpus) as loader:
        assert loader.set_state(state) == "seq_len 64 -> 128"
        assert next(loader)["tokens"].shape == (4, 128)
        (first, second) = loader.get_state()["entries"]
    assert first["step"] == 0 and second["step"] == 1
    assert second["shares"][0]["start"] == pytest.approx(2, abs=1)  # 4 rows of 64


def test_changes_before_the_first_batch_leave_no_trace(config):
    with make_loader(config()) as loader:
        state = loader.get_state()
    with make_loader(config(batch_size=8)) as loader:
        loader.set_state(state)
        (entry,) = loader.get_state()["entries"]
    assert entry["batch_size"] == 8 and entry["shares"][0]["start"] == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_skipped_window_is_left_out_for_good(config, workers):
    corpus = open_corpus(config())
    whole = take(make_loader(config(), seed=4, corpus=corpus), 20)
    with make_loader(config(workers=workers), seed=4, corpus=corpus) as loader:
        check_equal([next(loader) for _ in range(5)], whole[:5])
        loader.reset(3)  # back to the checkpoint of step 3
        loader.skip(2)
        check_equal([next(loader) for _ in range(4)], whole[5:9])
        state = json.loads(json.dumps(loader.get_state()))
        loader.skip(1)
        loader.skip(1)
        check_equal([next(loader)], whole[11:12])
    assert [(entry["step"], entry["skipped"]) for entry in state["entries"]] == [(0, 0), (3, 2)]
    with make_loader(config(), seed=4, corpus=corpus) as loader:
        assert loader.set_state(state) == ""
        check_equal([next(loader) for _ in range(2)], whole[9:11])
        loader.reset(1)  # before the window: as it was
        check_equal([next(loader) for _ in range(4)], [*whole[1:3], *whole[5:7]])


def test_states_of_before_go_on_exactly(config):
    corpus = open_corpus(config())
    whole = take(make_loader(config(), seed=7, corpus=corpus), 9)
    fingerprint = corpus.stats["train"]["fingerprint"]
    old = {"step": 4, "split": "train", "seed": 7, "batch_size": 4, "seq_len": 64, "fingerprint": fingerprint}
    with make_loader(config(), seed=7, corpus=corpus) as loader:
        assert loader.set_state(old) == ""
        check_equal([next(loader) for _ in range(5)], whole[4:])
    with make_loader(config(seq_len=32), seed=7, corpus=corpus) as loader:
        assert loader.set_state(old) == "seq_len 64 -> 32"
        assert loader.get_state()["entries"][1]["shares"][0]["start"] == pytest.approx(32, abs=1)


def test_other_text_is_an_entry_that_begins_at_its_first_row(config, folder):
    with make_loader(config()) as loader:
        for _ in range(3):
            next(loader)
        state = loader.get_state()
    with open(folder / "a.jsonl", "a") as file:
        file.write('{"text": "more"}\n' * 30)
    corpus = open_corpus(config())
    fresh = take(make_loader(config(), corpus=corpus), 2)
    with make_loader(config(), corpus=corpus) as loader:
        assert loader.set_state(state).startswith("data ")
        check_equal([next(loader) for _ in range(2)], fresh)
        state = loader.get_state()
        with pytest.raises(ConfigError, match=r"step 1 was made of data .* that data.path does not name"):
            loader.reset(1)
            next(loader)
    assert [entry["step"] for entry in state["entries"]] == [0, 3]


def test_damaged_states_are_one_line(config):
    rng = np.random.default_rng(0)
    odd = (None, -1, 1.5, "x", [], {}, True, 10**30, float("nan"), [1], {"a": 1})
    with make_loader(config()) as loader:
        good = loader.get_state() | {"step": 3}

        def paths(node, prefix=()):
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                yield (*prefix, key)
                if isinstance(value, dict | list):
                    yield from paths(value, (*prefix, key))

        for path in paths(good):
            for value in (odd[i] for i in rng.permutation(len(odd))[:5]):
                state = json.loads(json.dumps(good))
                node = state
                for key in path[:-1]:
                    node = node[key]
                node[path[-1]] = value
                try:
                    loader.set_state(state)
                except ConfigError as error:
                    assert "\n" not in str(error) and len(str(error)) < 400
        for state in (None, [], 3, "x", {}, {"step": 3}):
            with pytest.raises(ConfigError):
                loader.set_state(state)
    with pytest.raises(ConfigError, match="must ascend from 0"):
        from_json({"entries": [good["entries"][0] | {"step": 2}]})
