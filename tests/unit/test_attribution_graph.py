"""Attribution graphs: every target is the sum of what reaches it, in every architecture, and effects are true ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from circuitflow.dictionaries.dictionary import Dictionary, Skip
from circuitflow.dictionaries.family import Family
from circuitflow.errors import UserError
from circuitflow.graphs.building import Clock, Settings, build_graph, tokenized
from circuitflow.graphs.directions import parts_of
from circuitflow.graphs.graph import NO_TOKEN, Graph
from circuitflow.graphs.influence import scores
from circuitflow.graphs.mixing import _padded, mix
from circuitflow.graphs.rows import Targets, compute_rows, feature_targets
from circuitflow.graphs.sources import Sources
from circuitflow.graphs.targets import Direction, token_id
from circuitflow.models.architectures import ARCHITECTURES
from circuitflow.models.frozen import FrozenPrompt
from circuitflow.models.holding import holding, recording
from circuitflow.models.running import LanguageModel, run
from tests.fixtures.graph_examples import autograd_graph, random_family

TOKENS = [3, 17, 9, 40, 11, 25]
ALL = Settings(max_nodes=None, reorder_every=7, batch=5)
CASES = [
    *((architecture, ()) for architecture in ARCHITECTURES),
    ("gpt_neox", (("use_parallel_residual", False),)),
    ("gemma2", (("sliding_window", 3),)),
]
KINDS = ({}, {"skip": True}, {"cross": True})


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_incoming_effects_and_biases_sum_to_each_target(random_lm, case, kind):
    """Pre-activations of features and centred logits, to rounding: the invariant that covers every path."""
    lm = random_lm(case[0], **dict(case[1]))
    family = random_family(lm, **kind)
    graph = build_graph(lm, family, TOKENS, targets=[4, 11], settings=ALL)
    values, n = graph.values(), len(graph.features)
    assert n == lm.n_layers * len(TOKENS) * 3
    assert np.array_equal(graph.targets, [*range(n), graph.n_nodes - 2, graph.n_nodes - 1])
    np.testing.assert_allclose(values[:n], graph.activations, rtol=1e-10)
    with torch.no_grad():
        mask = torch.ones(1, len(TOKENS), dtype=torch.bool)
        last = run(lm, torch.tensor([TOKENS]), mask).last[0, -1]
        logits = lm._unembed(lm._final_norm(last))
    np.testing.assert_allclose(values[n:], (logits[[4, 11]] - logits.mean()).numpy(), rtol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_effects_are_gradients_of_the_linearised_model(random_lm, case, kind):
    """Of every node, row by row against automatic differentiation through the model under LINEAR, MLP outputs cut."""
    lm = random_lm(case[0], **dict(case[1]))
    family = random_family(lm, **kind)
    ours = build_graph(lm, family, TOKENS, targets=[4, 11], settings=ALL)
    theirs = autograd_graph(lm, family, TOKENS, [4, 11])
    for name in ("features", "errors", "targets"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_allclose(ours.weights, theirs.weights, rtol=1e-9, atol=1e-11)
    for kind_of_node in range(3):
        assert np.abs(theirs.weights[:, theirs.kinds() == kind_of_node]).max() > 0.1


def test_what_features_write_is_gathered_once(random_lm, monkeypatch):
    calls, decoder = [], Family.decoder
    monkeypatch.setattr(Family, "decoder", lambda *given: calls.append(given[1:]) or decoder(*given))
    lm = random_lm("llama")
    build_graph(lm, random_family(lm, cross=True), TOKENS, settings=ALL)
    assert sorted(calls) == [(0, "mlp.0"), (0, "mlp.1"), (1, "mlp.1")]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
def test_doubling_a_feature_changes_each_target_by_its_weight(random_lm, architecture):
    """A true forward pass with patterns, scales and other MLP outputs held, and the feature's output added again."""
    lm = random_lm(architecture)
    family = random_family(lm)
    graph = build_graph(lm, family, TOKENS, targets=[4], settings=ALL)
    ids, mask = torch.tensor([TOKENS]), torch.ones(1, len(TOKENS), dtype=torch.bool)
    source = int(np.flatnonzero((graph.features[:, 0] == 0) & (graph.features[:, 1] == 2))[0])
    added = torch.zeros(1, len(TOKENS), lm.d_model, dtype=torch.float64)
    added[0, 2] = graph.activations[source] * family.members[0].W_dec[graph.features[source, 2]]
    with recording(lm) as recorded:
        clean = run(lm, ids, mask, capture=["mlp.0", "mlp_in.1", "mlp.1", "resid.1"])
        lm.unembed(clean.last)
    outputs = {"mlp.0": lambda x: x + added, "mlp.1": lambda _: clean.sites["mlp.1"]}
    with holding(lm, recorded, attention=True, norms_too=True):
        moved = run(lm, ids, mask, capture=["mlp_in.1", "resid.1"], replace=outputs)
        unembedded = [lm._unembed(lm._final_norm(this.last))[0, -1] for this in (clean, moved)]
    change = moved.sites["mlp_in.1"] - clean.sites["mlp_in.1"]
    rows = np.flatnonzero(graph.features[:, 0] == 1)
    _, positions, features = torch.from_numpy(graph.features[rows]).T
    expected = (family.members[1].W_enc[features] * change[0, positions]).sum(1).numpy()
    np.testing.assert_allclose(graph.weights[rows, source], expected, atol=1e-11)
    assert np.abs(expected).max() > 1e-3
    assert not graph.weights[rows][positions.numpy() < 2, source].any()
    before, after = (logits[4] - logits.mean() for logits in unembedded)
    assert np.isclose(graph.weights[-1, source], float(after - before), atol=1e-11)


def perfect(lm):
    """Transcoders that are exact on the prompt: one feature per position, which writes the MLP's output there."""
    frozen = FrozenPrompt.of(lm, torch.tensor(TOKENS))
    members = []
    for layer in range(lm.n_layers):
        x, y = frozen.sites[f"mlp_in.{layer}"], frozen.sites[f"mlp.{layer}"]
        encoder = torch.linalg.pinv(x).T  # feature i is 1 at token i and 0 elsewhere
        none = torch.zeros(len(x), dtype=x.dtype)
        members.append(
            Dictionary(
                "relu", (f"mlp_in.{layer}",), (f"mlp.{layer}",), "threshold", encoder, none, y,
                torch.zeros_like(y[0]), extra={"threshold": none + 1e-6},
            )
        )  # fmt: skip
    return Family(tuple(members))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_a_perfect_transcoder_has_no_errors_and_scores_1(random_lm, architecture):
    lm = random_lm(architecture)
    graph = build_graph(lm, perfect(lm), TOKENS, settings=ALL)
    assert len(graph.features) == lm.n_layers * len(TOKENS)
    errors = graph.weights[:, graph.first_error : graph.first_token]
    assert np.abs(errors).max() < 1e-9 * np.abs(graph.weights).max()
    assert np.allclose(scores(graph), 1.0)
    worse = random_family(lm)
    assert max(scores(build_graph(lm, worse, TOKENS, settings=ALL))) < 0.95


def test_neither_batches_nor_rows_per_update_of_the_order_change_the_graph(random_lm):
    lm = random_lm("gemma2")
    family = random_family(lm)
    first = build_graph(lm, family, TOKENS, settings=ALL)
    for batch, update in ((1, 7), (64, 7), (5, 100)):
        other = build_graph(lm, family, TOKENS, settings=replace(ALL, batch=batch, reorder_every=update))
        assert np.array_equal(first.features, other.features)
        np.testing.assert_allclose(first.weights, other.weights, atol=1e-12)
        np.testing.assert_allclose(first.bias, other.bias, atol=1e-12)


def test_a_cap_keeps_the_most_influential_features_and_the_sum_of_the_rest(random_lm):
    lm = random_lm("llama")
    family = random_family(lm)
    whole = build_graph(lm, family, TOKENS, settings=ALL)
    capped = build_graph(lm, family, TOKENS, settings=Settings(max_nodes=10, reorder_every=1))
    assert len(capped.features) == 10
    assert capped.rest is not None
    place = {tuple(feature): node for node, feature in enumerate(whole.features.tolist())}
    nodes = [place[tuple(feature)] for feature in capped.features.tolist()]
    others = range(len(whole.features), whole.n_nodes)
    rows = np.searchsorted(whole.targets, [*nodes, *whole.targets[len(whole.features) :]])
    np.testing.assert_allclose(capped.weights, whole.weights[np.ix_(rows, [*nodes, *others])], atol=1e-12)
    np.testing.assert_allclose(capped.values(), whole.values()[rows], rtol=1e-10)
    # by hand: the first is the largest |effect| of the logits, each logit's effects summing to its probability
    size = np.abs(whole.weights[len(whole.features) :])
    share = (whole.probabilities[:, None] * size / size.sum(1, keepdims=True)).sum(0)[: len(whole.features)]
    assert int(np.argmax(share)) in nodes
    kept = build_graph(lm, family, TOKENS, settings=Settings(max_nodes=10, reorder_every=1, keep_all=True))
    assert (len(kept.features), len(kept.targets)) == (len(whole.features), len(capped.targets))
    np.testing.assert_allclose(kept.weights, whole.weights[rows], atol=1e-12)
    assert kept.rest is None
    assert 0 < kept.facts["influence_left_out"] < 1
    assert whole.facts["influence_left_out"] == 0


def test_layers_without_a_transcoder_and_skipped_positions_are_errors_alone(random_lm):
    lm = random_lm("llama")
    only = random_family(lm).members[1]
    graph = build_graph(lm, Family((replace(only, skip=Skip((0,))),)), TOKENS, settings=ALL)
    assert set(graph.features[:, 0]) == {1}
    assert set(graph.features[:, 1]) == {1, 2, 3, 4, 5}
    assert graph.facts["skipped"] == [[1, 0]]
    rows = graph.targets < len(graph.features)
    np.testing.assert_allclose(graph.values()[rows], graph.activations, rtol=1e-10)
    assert graph.weights[:, graph.first_error : graph.first_error + 6].any(axis=0).all()  # layer 0


def test_targets_are_what_the_user_names(random_lm):
    lm = random_lm("llama")
    family = random_family(lm)
    likely = build_graph(lm, family, TOKENS, settings=replace(ALL, max_logits=3))
    probabilities = torch.softmax(FrozenPrompt.of(lm, torch.tensor(TOKENS)).logits, 0)
    assert likely.logits.tolist() == probabilities.topk(3).indices.tolist()
    word = likely.logit_tokens[1]
    second = int(likely.logits[2])
    mixed = {"tokens": {word: 1.0, likely.logit_tokens[2]: -1.0}, "weight": 2.0}
    row = torch.ones(lm.d_model, dtype=torch.float64)
    named = build_graph(
        lm, family, TOKENS, targets=[word, second, mixed, Direction("sum", row, 3.0)], settings=ALL
    )
    assert named.logits.tolist() == [int(likely.logits[1]), second, NO_TOKEN, NO_TOKEN]
    np.testing.assert_allclose(named.probabilities[:2], likely.probabilities[1:])
    assert named.probabilities[2:].tolist() == [2.0, 3.0]
    rows = named.weights[-4:, : named.first_logit]
    np.testing.assert_allclose(rows[2], rows[0] - rows[1], atol=1e-12)
    frozen = FrozenPrompt.of(lm, torch.tensor(TOKENS), capture=["resid.1"])
    assert np.isclose(named.values()[-1], float(frozen.final(row[None]) @ frozen.sites["resid.1"][-1]))
    few = build_graph(lm, family, TOKENS, settings=replace(ALL, probability=0.01))
    assert len(few.logits) == 1


def test_a_graph_knows_the_vocabulary_and_what_directions_are_made_of(random_lm):
    lm = random_lm("llama")
    words = build_graph(lm, random_family(lm), TOKENS, targets=[4, 11], settings=ALL).logit_tokens
    mixed = {"tokens": {words[0]: 1, words[1]: -0.5}}
    row = Direction("sum", torch.ones(lm.d_model, dtype=torch.float64))
    graph = build_graph(lm, random_family(lm), TOKENS, targets=[4, mixed, row], settings=ALL)
    assert graph.facts["vocab_size"] == lm.hf.config.vocab_size
    assert graph.facts["directions"] == {"1": {"4": 1.0, "11": -0.5}}
    assert parts_of(graph) == [{4: 1.0}, {4: 1.0, 11: -0.5}, {}]


def test_tokens_keep_the_space_before_them(random_lm):
    """SentencePiece vocabularies write it in the token, and their tokenizers drop it where a text begins."""
    entries = {"<unk>": 0, "▁The": 1, "▁key": 2, "are": 3, "▁are": 4, "s": 5}
    core = Tokenizer(models.WordLevel(entries, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    lm = LanguageModel(
        random_lm("llama").hf, PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    )
    assert lm.tokenizer.decode([4]) == "are"
    graph = build_graph(lm, random_family(lm), [1, 2, 5], targets=[3, 4])
    assert graph.tokens == (" The", " key", "s")
    assert graph.logit_tokens == ("are", " are")
    with pytest.raises(UserError, match=r"\[' The', ' key'\]"):
        token_id(lm.tokenizer, "The key", 6)


def test_words_that_the_tokenizer_does_not_know_are_told(random_lm):
    lm = random_lm("llama")
    with pytest.raises(UserError, match=r"'The zebra near the quagga' has words .*\(zebra, quagga\)"):
        build_graph(lm, random_family(lm), "The zebra near the quagga")
    for prompt, said in (
        ("The teacher ", r"^Prompt 'The teacher ' has white space at its end that .*; take it out"),
        ("The  teacher", "white space between words that"),
        ("The teacher " * 400, r"^Prompt '.{81}' has white space at its end"),
    ):
        with pytest.raises(UserError, match=said):
            tokenized(lm.tokenizer, prompt)
    with pytest.raises(UserError, match=r"^Prompt '.{81}' has 4000 tokens, but the model takes at most"):
        build_graph(lm, random_family(lm), ("The teacher " * 2000).strip())
    assert tokenized(lm.tokenizer, "The teacher")[1].tolist() == lm.tokenizer("The teacher")["input_ids"]


@pytest.mark.parametrize(
    ("targets", "said"),
    [(["two words"], "is not one token"), ([10**6], "no token id"), ([], "targets is empty"),
     ([{"tokens": {}}], "names no tokens"), ([{"token": {"a": 1.0}}], "tokens"),
     ([Direction("x", torch.ones(3))], "width 16")],
)  # fmt: skip
def test_wrong_targets_are_told(random_lm, targets, said):
    lm = random_lm("llama")
    with pytest.raises(UserError, match=said):
        build_graph(lm, random_family(lm), TOKENS, targets=targets)


def test_dictionaries_that_are_no_transcoders_are_told(random_lm):
    lm = random_lm("llama")
    first, second = random_family(lm).members
    for member, said in (
        (replace(first, reads=("resid.0",)), "no transcoder"),
        (replace(second, writes=("mlp.0",)), "no transcoder"),
        (replace(second, writes=("mlp.7",)), "beyond the model's 2 layers"),
        (replace(first, W_enc=None), "no encoder"),
    ):
        with pytest.raises(UserError, match=said):
            build_graph(lm, Family((member,)), TOKENS)
    with pytest.raises(UserError, match="same layer"):
        build_graph(lm, Family((first, first)), TOKENS)


def test_a_time_limit_ends_with_a_usable_graph_that_says_so(random_lm):
    lm = random_lm("llama")
    clock = Clock(limit=-1.0)
    graph = build_graph(lm, random_family(lm), TOKENS, settings=ALL, clock=clock)
    assert graph.facts["stopped_early"]
    assert len(graph.targets) == len(graph.logits)
    assert {"forward pass", "features", "rows"} <= set(clock.phases)


def test_a_graph_comes_back_from_its_file_bit_for_bit(random_lm, tmp_path):
    graph = build_graph(
        random_lm("llama"), random_family(random_lm("llama")), TOKENS, settings=Settings(max_nodes=9)
    )
    for name in ("one", "two"):
        graph.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    back = Graph.load(tmp_path / "one")
    for name, value in vars(graph).items():
        found = getattr(back, name)
        same = (
            np.array_equal(found, value) and found.dtype == value.dtype
            if isinstance(value, np.ndarray)
            else found == value
        )
        assert same, name
    assert len(set(back.node_ids())) == back.n_nodes
    (tmp_path / "one").write_bytes(b"no graph")
    for wrong in ("one", "none"):
        with pytest.raises(UserError, match=wrong):
            Graph.load(tmp_path / wrong)


def test_restricting_moves_what_features_did_to_the_rest(random_lm):
    graph = build_graph(random_lm("llama"), random_family(random_lm("llama")), TOKENS, settings=ALL)
    kept = graph.features[:, 1] > 2
    small = graph.restricted(kept)
    rows = np.concatenate([np.flatnonzero(kept), np.arange(len(kept), len(graph.targets))])
    np.testing.assert_allclose(small.values(), graph.values()[rows], atol=1e-12)
    assert len(small.features) == kept.sum()
    assert small.rest is not None
    assert np.abs(small.rest).max() > 1e-3


def test_mixing_compiled_is_mixing_by_products():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 1, 3, 4])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    first = torch.tensor([0, 0, 2, 3])
    z = torch.randn(int(starts[-1]), 6, 5, generator=generator, dtype=torch.float64)
    pattern = torch.randn(6, 4, 4, generator=generator, dtype=torch.float64).tril()
    out = torch.empty(len(z), 2, 5, dtype=torch.float64)
    mix(z, pattern, starts, first, out)
    expected = torch.zeros_like(out)
    for target, (start, length) in enumerate(zip(starts[:-1], lengths, strict=True)):
        for k in range(length):
            for q in range(max(k, int(first[target])), length):
                for head in range(6):
                    expected[start + k, head // 3] += pattern[head, q, k] * z[start + q, head]
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.allclose(_padded(z, pattern, starts, first, 2), expected, atol=1e-12)


def test_rows_do_not_depend_on_the_order_or_company_of_targets(random_lm):
    lm = random_lm("qwen2")
    with torch.no_grad():
        sources = Sources.of(FrozenPrompt.of(lm, torch.tensor(TOKENS)), random_family(lm))
        some = torch.tensor([20, 3, 31, 7])
        together = compute_rows(sources, feature_targets(sources, some))
        for row, feature in enumerate(some):
            alone = compute_rows(sources, feature_targets(sources, feature[None]))
            for name in ("features", "errors", "tokens", "bias"):
                assert torch.allclose(getattr(together, name)[row], getattr(alone, name)[0], atol=1e-12)
        none = Targets(some[:0], some[:0], sources.errors[0, :0], sources.errors[0, :0, 0])
        assert compute_rows(sources, none).features.shape == (0, sources.n_features)
