"""What the model thinks of the answers, and which pairs it does with confidence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from circuitflow.data import confidence
from circuitflow.data.confidence import Confidence, filter_pairs, measure, passes
from circuitflow.data.metrics import Metric
from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.running import LanguageModel
from circuitflow.store.tables import read_table, write_table

VOCABULARY = 20
JOIN = Metric("logit_difference", "logsumexp")
EVERYTHING = {"min_difference": None, "min_probability": 0.0, "max_rank": None}
PARAMS = {
    **EVERYTHING,
    "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
    "dtype": "float32",
    "compute": {"device": "cpu", "threads": 1},
}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    torch.set_num_threads(1)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageModel(AutoModelForCausalLM.from_config(config), tokenizer=None)


def columns(n: int = 24, unpaired: int = 3, seed: int = 0) -> dict[str, list[Any]]:
    """A token table of random prompts of three to five tokens; the last ``unpaired`` have no patched prompt."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {name: [] for name in ("clean", "patch", "right", "wrong", "position")}
    for row in range(n):
        clean = rng.integers(1, VOCABULARY, 3 + row % 3).tolist()
        patch = [*clean[:-1], clean[-1] % (VOCABULARY - 1) + 1] if row < n - unpaired else []
        answers = rng.permutation(VOCABULARY)[:4].tolist()
        values = (clean, patch, answers[: 1 + row % 2], answers[2 : 3 + row % 2], len(clean) - 1 - (row == 0))
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    texts = {
        f"{name}_{kind}": [
            f"{name} {row}" if kind == "text" else [f"t{t}" for t in tokens]
            for row, tokens in enumerate(rows[name])
        ]
        for name, kind in (("clean", "text"), ("patch", "text"), ("right", "tokens"), ("wrong", "tokens"))
    }
    return {
        "pair": list(range(10, 10 + n)),
        "case": ["a", "b"] * (n // 2),
        "variant": [""] * n,
        "first_change": [0] * n,
        **rows,
        **texts,
    }


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Path]:
    for seed, split in enumerate(("train", "test")):
        write_table(tmp_path / f"{split}.in.parquet", columns(seed=seed))
    return {split: tmp_path / f"{split}.in.parquet" for split in ("train", "test")}


@pytest.fixture
def pairs(tables: dict[str, Path]) -> TokenPairs:
    return load_token_pairs(tables["train"])


def by_hand(
    lm: LanguageModel, tokens: list[int], position: int, right: list[int], wrong: list[int]
) -> tuple[float, ...]:
    """Difference, probability and rank of one prompt, from the plain model without padding."""
    with torch.no_grad():
        logits = lm.hf(torch.tensor([tokens])).logits[0, position].double().numpy()
    p = np.exp(logits) / np.exp(logits).sum()
    difference = np.log(np.exp(logits[right]).sum()) - np.log(np.exp(logits[wrong]).sum())
    return difference, p[right].sum(), 1 + (logits > logits[right].max()).sum()


@pytest.mark.parametrize("side", ["clean", "patched"])
def test_values_equal_those_of_single_unpadded_prompts(
    lm: LanguageModel, pairs: TokenPairs, side: str
) -> None:
    found = measure(lm, pairs, JOIN, side)
    table = columns()
    names = ("clean", "right", "wrong") if side == "clean" else ("patch", "wrong", "right")
    for row in range(len(pairs)):
        tokens, right, wrong = (table[name][row] for name in names)
        if tokens:
            expected = by_hand(lm, tokens, table["position"][row], right, wrong)
            np.testing.assert_allclose(
                (found.difference[row], found.probability[row], found.rank[row]),
                expected,
                rtol=1e-4,
                atol=1e-5,
            )


def test_several_answers_are_joined_as_the_metric_says(lm: LanguageModel, pairs: TokenPairs) -> None:
    joined, most = (measure(lm, pairs, Metric("kl", join), "clean") for join in ("logsumexp", "max"))
    several = (pairs.right >= 0).sum(1).numpy() > 1
    assert several.any()
    assert (joined.right_logit[several] > most.right_logit[several] + 1e-3).all()
    np.testing.assert_allclose(joined.right_logit[~several], most.right_logit[~several], rtol=1e-6)
    assert (joined.probability == most.probability).all()


def test_values_do_not_depend_on_the_batch(
    lm: LanguageModel, pairs: TokenPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(lm, pairs, JOIN, "clean")
    monkeypatch.setattr(confidence, "BATCH_PROMPTS", 5)
    np.testing.assert_allclose(
        measure(lm, pairs, JOIN, "clean").difference, whole.difference, rtol=1e-4, atol=1e-5
    )


def test_thresholds() -> None:
    found = Confidence(
        np.array([2.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0]), np.array([0.5, 0.2, 0.9]), np.array([1, 5, 2])
    )
    assert found.difference.tolist() == [2, 0, -1]
    for change, expected in (
        ({}, [True, True, True]),
        ({"min_difference": 0.0}, [True, True, False]),
        ({"min_difference": 0.1}, [True, False, False]),
        ({"min_probability": 0.5}, [True, False, True]),
        ({"max_rank": 2}, [True, False, True]),
        ({"max_rank": 1, "min_difference": -5.0}, [True, False, False]),
    ):
        assert passes(found, EVERYTHING | change).tolist() == expected


def staged(
    tmp_path: Path,
    tables: dict[str, Path],
    lm: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    **changes: Any,
) -> Output:
    monkeypatch.setattr(confidence, "load_model", lambda path, dtype, device: lm)
    out = Output(tmp_path, {name: tmp_path / f"{name}.parquet" for name in ("train", "test", "prompts")}, {})
    filter_pairs({"model": tmp_path / "model.json", **tables}, PARAMS | changes, out)
    return out


def test_the_stage_keeps_confident_pairs_and_tells_of_all(
    tmp_path: Path, tables: dict[str, Path], lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = staged(tmp_path, tables, lm, monkeypatch, min_difference=0.0)
    prompts = read_table(out.files["prompts"])
    assert len(prompts["pair"]) == 2 * (24 + 21)  # three pairs of each split have no patched prompt
    for split in ("train", "test"):
        clean = (prompts["split"] == split) & (prompts["side"] == "clean")
        right = prompts["difference"][clean] >= 0
        assert 0 < right.sum() < 24
        assert (
            load_token_pairs(out.files[split]).pair.tolist()
            == prompts["pair"][clean & prompts["kept"]].tolist()
        )
        assert (prompts["kept"][clean] == right).all()
    np.testing.assert_allclose(
        prompts["difference"], prompts["right_logit"] - prompts["wrong_logit"], rtol=1e-6
    )
    first = (prompts["pair"] == 11) & (prompts["split"] == "train")
    assert prompts["prompt"][first].tolist() == ["clean 1", "patch 1"]
    assert prompts["right_answer"][first].tolist() == prompts["wrong_answer"][first][::-1].tolist()
    assert " | " in prompts["right_answer"][first][0]


def test_without_thresholds_the_tables_stay_as_they_were(
    tmp_path: Path, tables: dict[str, Path], lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = staged(tmp_path, tables, lm, monkeypatch)
    before, after = load_token_pairs(tables["train"]), load_token_pairs(out.files["train"])
    assert after.clean.equal(before.clean)
    assert after.patch.equal(before.patch)
    assert after.wrong.equal(before.wrong)
    assert after.has_patch.equal(before.has_patch)


def test_a_split_without_confident_pairs_tells_the_best_values(
    tmp_path: Path, tables: dict[str, Path], lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"No train pair passes task.confidence \(min_difference 50.0, min_prob.*rank 1"
    ):
        staged(tmp_path, tables, lm, monkeypatch, min_difference=50.0)


@pytest.mark.parametrize("join", ["max", "logsumexp"])
def test_without_wrong_answers_the_likeliest_other_token_takes_their_place(
    lm: LanguageModel, tmp_path: Path, join: str
) -> None:
    table = columns(n=12, unpaired=12)
    table["wrong"], table["wrong_tokens"] = [[]] * 12, [[]] * 12
    write_table(tmp_path / "text.parquet", table)
    pairs = load_token_pairs(tmp_path / "text.parquet")
    assert pairs.wrong.shape == (12, 0)
    found = measure(lm, pairs, Metric("logit", join), "clean")
    for row in range(12):
        with torch.no_grad():
            logits = lm.hf(torch.tensor([table["clean"][row]])).logits[0, table["position"][row]].double()
        right = table["right"][row]
        others = [float(value) for token, value in enumerate(logits) if token not in right]
        assert found.wrong_logit[row] == pytest.approx(max(others), abs=1e-4)
        if len(right) == 1:
            assert (found.difference[row] > 0) == (found.rank[row] == 1)
