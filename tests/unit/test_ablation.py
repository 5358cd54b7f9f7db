"""Interventions by their definition, identities that hold for any model, and passes that save work without a trace."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits import ablation
from circuitflow.circuits.ablation import (
    AblationSite,
    Prompts,
    Tokens,
    ablated,
    logits_of_interventions,
    run_interventions,
    start_of,
)
from circuitflow.circuits.evaluation import Evaluation, evaluated, planned
from circuitflow.circuits.interventions import (
    complement,
    everything,
    from_site,
    hold,
    keep,
    nothing,
    remove,
)
from circuitflow.circuits.means import Means
from circuitflow.circuits.replacement import Cells, run_values, zeros
from circuitflow.circuits.statistics import faithfulness
from circuitflow.data.metrics import Metric
from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.dictionary import Dictionary, Skip
from circuitflow.store.journal import Journal
from tests.fixtures.attribution_toy import (
    METRIC,
    cached_sites,
    identity_dictionary,
    metric_with,
    toy_dictionary,
    toy_pairs,
)

WIDTH, D_DICT = 16, 24
SITES = ("embed", "mlp.0", "resid.0", "resid.1")
ALL = [*range(D_DICT), ERROR]
SKIP = Skip((0,), 30.0)
RULES = ("topk", "threshold")


def dictionary_of(rule: str, site: str, seed: int) -> Dictionary:
    """Random, with outliers; features compete (topk) or each has a threshold."""
    made = toy_dictionary(site, WIDTH, D_DICT, seed=seed, skip=SKIP)
    if rule == "topk":
        return made
    threshold = torch.rand(D_DICT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return replace(made, kind="jumprelu", select="threshold", settings={}, extra={"threshold": threshold})


def made(lm, names, make, ablated_to="mean", n=5) -> Evaluation:
    """Sites with means over 12 training pairs, on ``n`` test pairs."""
    train, test = toy_pairs(12, seed=1), toy_pairs(n, seed=2)
    training, testing = cached_sites(lm, train, names), cached_sites(lm, test, names)
    sites = []
    for seed, name in enumerate(names):
        dictionary = make(name, seed)
        known = {
            run: run_values(getattr(testing[name], run), test.mask, dictionary)
            for run in ("clean", "patched")
        }
        means = Means(dictionary, Cells.over(train))
        means.add(training[name].patched, train)
        known["mean"] = means.values().at(test, dictionary)
        known["zero"] = zeros(dictionary, test)
        known["replacement"] = known[ablated_to]
        sites.append(AblationSite(name, dictionary, {key: lambda it=it: it for key, it in known.items()}))
    return Evaluation(lm, METRIC, sites, Prompts(test), metric_with(lm, test).numpy())


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def lm(request, random_lm):
    return random_lm(request.param)


@pytest.fixture(scope="module", params=RULES)
def setting(request, lm):
    return made(lm, SITES, lambda name, seed: dictionary_of(request.param, name, seed))


def of(site: str, features, position: int = SUMMED) -> list:
    return [(site, feature, position) for feature in features]


def some_interventions() -> list:
    """Circuits with and without errors, by position, complements, and held nodes."""
    nodes = [
        *of("embed", [3, ERROR]),
        *of("mlp.0", [1, 7]),
        *of("resid.0", [5, 6]),
        *of("resid.1", [1, 2, 8]),
    ]
    found = [
        keep(nodes, SITES),
        keep([*nodes, ("resid.1", ERROR, SUMMED), ("mlp.0", ERROR, 2)], SITES),
        keep(of("resid.1", range(12)), SITES),
        keep(
            [("embed", 3, 1), ("embed", 4, 3), ("resid.0", 5, 2), ("resid.0", ERROR, 2), *of("resid.1", [6])],
            SITES,
        ),
        keep(of("embed", [ERROR]), SITES),
    ]
    found += [complement(one) for one in found]
    restored = [("resid.0", 5, SUMMED), ("resid.0", 9, 3), ("resid.0", ERROR, 2), ("mlp.0", 4, SUMMED)]
    found += [hold(one, restored, "clean") for one in (found[0], found[5], found[3], everything(SITES))]
    found += [hold(one, [*restored, ("embed", 5, SUMMED)], "patched") for one in (nothing(SITES), found[6])]
    found.append(hold(hold(found[1], of("mlp.0", [1, 20]), 3.5), [("mlp.0", 20, 2)], "clean"))
    return found


def source_of(state, feature: int, position: int):
    """Where a node's value comes from, by the words of the definition."""

    def names(group) -> bool:
        listed = list(zip(group.feature.tolist(), group.position.tolist(), strict=True))
        return (feature, SUMMED) in listed or (feature, position) in listed

    for held in reversed(state.held):
        if names(held):
            return held.value
    return "arriving" if names(state.kept) != state.kept.complement else "replacement"


def by_definition(x, site: AblationSite, states, tokens: Tokens) -> torch.Tensor:
    """x' = Σ_i f_i·W_dec[i] + b_dec + ε with every node from its own source, one token at a time."""
    result, dictionary = x.clone(), site.dictionary
    for row, position, number, prompt in zip(
        tokens.row, tokens.position, tokens.intervention, tokens.prompt, strict=True
    ):
        vectors = {"arriving": x[row, position][None]}
        values = {"arriving": dictionary.encode(vectors["arriving"], position[None]).dense()[0]}
        for name in ("replacement", "clean", "patched"):
            known = site.known(name)
            slot = known.slot[prompt, position]
            vectors[name], values[name] = known.whole[slot][None], known.features.dense()[slot]
        errors = {
            name: vectors[name][0] - values[name] @ dictionary.W_dec - dictionary.b_dec for name in values
        }
        state = states[number]
        chosen = [source_of(state, feature, int(position)) for feature in range(D_DICT)]
        f = torch.stack(
            [
                values[source][feature] if isinstance(source, str) else torch.tensor(source).double()
                for feature, source in enumerate(chosen)
            ]
        )
        error = errors[source_of(state, ERROR, int(position))]
        result[row, position] = f @ dictionary.W_dec + dictionary.b_dec + error
    return result


@pytest.mark.parametrize("place", range(len(SITES)))
def test_a_site_is_ablated_by_the_definition(setting, place):
    """Every intervention of a mixed pass, on a stream that is neither the clean nor the patched one."""
    site, pairs = setting.sites[place], setting.prompts.pairs
    states = [one[site.name] for one in some_interventions()]
    generator = torch.Generator().manual_seed(place)
    prompt = torch.arange(5).repeat_interleave(len(states))
    number = torch.arange(len(states)).repeat(5)
    mask = pairs.mask[prompt]
    x = torch.randn(*mask.shape, WIDTH, generator=generator, dtype=torch.float64)
    tokens = Tokens.of(number, prompt, mask)
    got = ablated(x, site, states, tokens)
    assert torch.allclose(got, by_definition(x, site, states, tokens), atol=1e-11)
    assert torch.equal(got[~mask], x[~mask])
    untouched = torch.tensor([state.untouched for state in states])[number]
    assert torch.equal(got[untouched], x[untouched])


def test_listed_features_give_what_the_whole_encoder_gives(lm, monkeypatch):
    here = made(lm, SITES, lambda name, seed: dictionary_of("threshold", name, seed))
    interventions = some_interventions()
    monkeypatch.setattr(ablation, "LISTED_SHARE", 0.5)
    listed = here.values(interventions, 100)
    calls = []
    encode = Dictionary.encode
    monkeypatch.setattr(Dictionary, "encode", lambda *given: calls.append(given) or encode(*given))
    plain = [keep([*of("embed", [3]), *of("resid.1", [1, 2, 8]), ("mlp.0", 7, 2)], SITES)]
    plain += [remove([*of("embed", [3]), *of("resid.0", [5])], SITES)]
    plain += [hold(plain[1], of("mlp.0", [3]), 1.5)]
    here.values(plain, 100)
    assert not calls  # no encoder was run as a whole
    monkeypatch.setattr(ablation, "LISTED_SHARE", -1.0)
    assert np.allclose(here.values(interventions, 100), listed, atol=1e-11)
    assert calls


def test_known_values_are_decoded_alike_by_columns_and_by_codes(setting, monkeypatch):
    interventions = some_interventions()
    found = []
    for gain in (0, 1e9):
        monkeypatch.setattr(ablation, "COLUMN_GAIN", gain)
        found.append(setting.values(interventions, 100))
    assert np.allclose(*found, atol=1e-11)


def test_the_full_circuit_is_the_model_and_the_empty_one_its_ablation(setting):
    full = keep([node for site in SITES for node in of(site, ALL)], SITES)
    m = setting.values(
        [full, nothing(SITES), complement(full), complement(nothing(SITES)), remove([], SITES)], 100
    )
    assert np.allclose(m[[0, 3, 4]], setting.full, atol=1e-10)
    assert np.allclose(m[1], m[2], atol=1e-10)
    known, pairs = setting.sites[-1].known("replacement"), setting.prompts.pairs
    whole = known.whole[known.slot].nan_to_num()
    assert np.allclose(m[1], metric_with(setting.lm, pairs, start=("resid.1", whole)), atol=1e-12)
    assert not np.allclose(m[1], setting.full, atol=1e-3)
    assert np.allclose(faithfulness(m[:4], m[1], setting.full, "ratio_of_means"), [1, 0, 0, 1], atol=1e-9)


@pytest.mark.parametrize("ablated_to", ["mean", "zero", "patched"])
def test_identity_dictionaries_have_no_error_and_keep_all_or_nothing(random_lm, ablated_to):
    lm = random_lm("llama")
    here = made(lm, SITES, lambda name, _: identity_dictionary(name, WIDTH), ablated_to)
    full = [node for site in SITES for node in of(site, range(WIDTH))]
    some = full[::3]
    rest = [node for node in full if node not in some]
    errors = [node for site in SITES for node in of(site, [ERROR])]
    m = here.values([keep(full, SITES), nothing(SITES), keep(some, SITES), remove(rest, SITES)], 100)
    assert np.allclose(m[0], here.full, atol=1e-10)
    assert np.allclose(faithfulness(m[:2], m[1], here.full, "ratio_of_means"), [1, 0], atol=1e-10)
    # With no error to speak of, keeping some is removing the rest, and its complement keeps the rest.
    assert np.allclose(m[2], m[3], atol=1e-10)
    others = here.values(
        [complement(keep(some, SITES)), keep(rest, SITES), keep([*rest, *errors], SITES)], 100
    )
    assert np.allclose(others, others[1], atol=1e-10)
    assert not np.allclose(m[2], others[0], atol=1e-4)


def test_completeness_is_the_complement_at_one_site_with_a_linear_rest(random_lm, monkeypatch):
    """There, F(C) + F(M∖C) = 1."""
    lm, sites = random_lm("llama"), ("resid.1",)
    readout = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def linear(lm, metric, this, pairs, reference):
        return torch.where(pairs.mask[..., None], this.last, 0).sum(1) @ readout

    monkeypatch.setattr(ablation, "metric_of_run", linear)
    here = made(lm, sites, lambda name, seed: dictionary_of("topk", name, seed))
    kept = keep(of("resid.1", [2, 7, 8, ERROR]), sites)
    m = here.values([kept, complement(kept), nothing(sites), everything(sites)], 100)
    part, rest = faithfulness(m[:2], m[2], m[3], "ratio_of_means")
    assert part + rest == pytest.approx(1)
    assert abs(part) > 0.01


def test_interventions_together_are_those_one_by_one(setting):
    interventions = some_interventions()
    together = setting.values(interventions, 1000)
    for size in (1, 3, 7):
        assert np.allclose(setting.values(interventions, size), together, atol=1e-11)
    alone = [setting.values([one], 1000)[0] for one in interventions]
    assert np.allclose(alone, together, atol=1e-11)
    assert len({round(float(m), 6) for m in together.mean(1)}) > 10


def test_held_nodes_bring_back_the_run_they_are_held_at(setting):
    """All nodes of a full cut held at a run's values make the rest that run, whatever was done before."""
    pairs = setting.prompts.pairs
    patched = metric_with(setting.lm, replace(pairs, clean=pairs.patch)).numpy()
    whole = of("resid.0", ALL)
    for base in (keep(of("embed", [2]), SITES), remove(of("embed", [2]), SITES)):
        free = {**base, "resid.1": everything(SITES)["resid.1"]}
        m = setting.values([hold(free, whole, "clean"), hold(free, whole, "patched"), free], 100)
        assert np.allclose(m[:2], [setting.full, patched], atol=1e-10)
        assert not np.allclose(m[2], setting.full, atol=1e-4)


def test_a_feature_is_held_at_a_number(setting):
    """Only its own direction moves, by the number less what it was."""
    site, pairs = setting.sites[2], setting.prompts.pairs
    state = hold(everything(SITES), [("resid.0", 4, 2)], 2.5)["resid.0"]
    x = setting.sites[2].known("clean")
    stream = torch.zeros(*pairs.mask.shape, WIDTH, dtype=torch.float64)
    stream[pairs.mask] = x.whole
    tokens = Tokens.of(torch.zeros(5, dtype=torch.int64), torch.arange(5), pairs.mask)
    moved = ablated(stream, site, [state], tokens) - stream
    was = x.columns(torch.tensor([4]))[x.slot[:, 2], 0]
    assert torch.allclose(moved[:, 2], (2.5 - was)[:, None] * site.dictionary.W_dec[4], atol=1e-12)
    assert not moved[:, [0, 1, 3, 4, 5]].any()


def test_replacement_by_the_patched_run_makes_the_empty_circuit_that_run(lm):
    here = made(lm, SITES, lambda name, seed: dictionary_of("topk", name, seed), "patched")
    pairs = here.prompts.pairs
    patched = metric_with(lm, replace(pairs, clean=pairs.patch)).numpy()
    assert np.allclose(here.values([nothing(SITES)], 100)[0], patched, atol=1e-10)
    assert np.allclose(
        here.values([hold(nothing(SITES), of("resid.1", ALL), "clean")], 100), here.full, atol=1e-10
    )


def test_replacement_by_zero_leaves_the_decoder_bias(lm):
    here = made(lm, SITES, lambda name, seed: dictionary_of("topk", name, seed), "zero")
    pairs = here.prompts.pairs
    bias = here.sites[-1].dictionary.b_dec.expand(*pairs.mask.shape, -1)
    m = here.values([nothing(SITES), everything(SITES)], 100)
    assert np.allclose(m[0], metric_with(lm, pairs, start=("resid.1", bias)), atol=1e-12)
    assert np.allclose(m[1], here.full, atol=1e-12)


def test_starting_late_changes_nothing(setting, monkeypatch):
    both = [*of("resid.0", [5]), *of("resid.1", [3])]
    interventions = [
        *some_interventions()[:5],
        *(from_site(nothing(SITES), start, SITES) for start in SITES),
        from_site(keep(of("resid.1", [3, ERROR]), SITES), "resid.1", SITES),
        from_site(keep([*of("mlp.0", [3]), *both], SITES), "mlp.0", SITES),
        from_site(keep(both, SITES), "resid.0", SITES),
        everything(SITES),
    ]
    starts = [start_of(one, setting.sites) for one in interventions]
    assert starts == [0, 0, 2, 0, 3, 3, 3, 3, 3, 3, 0, 2, 3]
    got = setting.values(interventions, 100)
    monkeypatch.setattr(ablation, "start_of", lambda *_: 0)
    assert np.allclose(setting.values(interventions, 100), got, atol=1e-11)
    monkeypatch.setattr(ablation, "start_of", lambda *_: -1)
    assert np.allclose(setting.values(interventions, 100), got, atol=1e-11)


def test_nothing_before_the_start_is_touched(setting):
    """From the first full cut on that everything before is kept for, the model is as from its tokens."""
    one = from_site(keep(of("resid.1", [3]), SITES), "resid.0", SITES)
    expected = setting.values(
        [{**everything(SITES), "resid.0": one["resid.0"], "resid.1": one["resid.1"]}], 9
    )
    assert np.allclose(setting.values([one], 9), expected, atol=1e-12)
    assert not np.allclose(setting.values([from_site(one, "resid.1", SITES)], 9), expected, atol=1e-4)


def test_passes_hold_rows_of_one_start_and_like_length(setting):
    interventions = some_interventions()[:10]
    plan = planned(interventions, setting.sites, [4, 6, 4, 6, 4], 12)
    assert sorted(row for rows in plan for row in rows) == [(c, p) for c in range(10) for p in range(5)]
    assert max(map(len, plan)) == 12
    for rows in plan:
        assert len({start_of(interventions[number], setting.sites) for number, _ in rows}) == 1
    assert {prompt for _, prompt in plan[0]} == {0, 2, 4}


def test_untouched_and_emptied_sites_are_not_encoded(setting, monkeypatch):
    encoded = []

    def counting(name, wrapped):
        def call(dictionary, *given):
            encoded.append(dictionary.reads[0])
            return wrapped(dictionary, *given)

        return call

    monkeypatch.setattr(Dictionary, "encode", counting("encode", Dictionary.encode))
    monkeypatch.setattr(ablation, "encode_listed", counting("listed", ablation.encode_listed))
    setting.values([remove(of("resid.0", [4]), SITES)], 100)
    assert encoded == ["resid.0"]
    setting.values([nothing(SITES), keep(of("resid.1", [ERROR]), SITES), everything(SITES)], 100)
    assert set(encoded[1:]) == {"resid.1"}  # its error alone: all its features are replaced


def test_kl_is_measured_from_the_clean_run(setting):
    logits = setting.logits([everything(SITES), nothing(SITES)], 100)
    with_reference = Prompts(setting.prompts.pairs, torch.from_numpy(logits[0]))
    rows = [(number, prompt) for number in (0, 1) for prompt in range(5)]
    arguments = (setting.sites, [everything(SITES), nothing(SITES)], with_reference, rows)
    m = run_interventions(setting.lm, Metric("kl", "max"), *arguments)
    assert torch.allclose(m[:5], torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert (m[5:] > 1e-3).all()


def test_logits_are_those_the_metric_reads(setting):
    interventions, pairs = some_interventions()[:7], setting.prompts.pairs
    logits = torch.from_numpy(setting.logits(interventions, 4))
    assert logits.shape[:2] == (7, 5)
    for number, m in enumerate(setting.values(interventions, 100)):
        assert np.allclose(METRIC(logits[number], pairs.right, pairs.wrong), m, atol=1e-10)
    rows = [(3, 1)]
    one = logits_of_interventions(setting.lm, setting.sites, interventions, setting.prompts, rows)
    assert torch.allclose(one[0], logits[3, 1], atol=1e-11)


@pytest.mark.parametrize("first", ["attn.0", "mlp.0"])
def test_evaluation_may_start_within_a_block(random_lm, first):
    """Passes then start from the tokens: all nodes kept is the model, and what skips the first site stays."""
    names = (first, "resid.1")
    here = made(random_lm("llama"), names, lambda name, seed: dictionary_of("topk", name, seed))
    full = keep([node for site in names for node in of(site, ALL)], names)
    assert [start_of(one, here.sites) for one in (full, nothing(names))] == [-1, 1]
    m = here.values([full, nothing(names), keep(of("resid.1", ALL), names)], 100)
    assert np.allclose(m[0], here.full, atol=1e-10)
    assert not np.allclose(m[2], here.full, atol=1e-4)
    assert not np.allclose(m[2], m[1], atol=1e-4)


def test_finished_passes_are_not_run_again(tmp_path):
    plan = [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]
    (tmp_path / "j").write_text(json.dumps([1.5, 2.5]) + "\n")
    seen = []

    def measure(rows):
        seen.append(rows)
        return torch.tensor([7.0, 8.0])

    assert evaluated(plan, measure, (2, 2), Journal(tmp_path / "j")).tolist() == [[1.5, 2.5], [7.0, 8.0]]
    assert seen == plan[1:]


def test_known_values_are_encoded_only_when_asked_for(setting):
    """A start needs a run's vectors, not its features."""
    asked = []
    site = setting.sites[0]

    def encode() -> Codes:
        asked.append(1)
        return site.known("clean").features

    known = type(site.known("clean"))(
        site.known("clean").whole, site.known("clean").slot, encode, site.dictionary.W_dec
    )
    lazy = AblationSite("embed", site.dictionary, {"clean": lambda: known, "replacement": lambda: known})
    here = replace(setting, sites=[lazy, *setting.sites[1:]])
    here.values([everything(SITES), remove(of("embed", [ERROR]), SITES)], 100)
    assert asked == [1]  # by the second: features stay as they arrive, the error is another
