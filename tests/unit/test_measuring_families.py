"""Quality of dictionaries that span sites: sums by hand, and what the model loses with MLPs replaced."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary, Skip
from circuitflow.dictionaries.family import Family
from circuitflow.dictionaries.measuring_families import FamilyQuality, kept_tokens
from circuitflow.dictionaries.replacing import ALL, Replacements, all_replaced
from circuitflow.models.running import LanguageModel, run

LAYERS = 2


def linear_mlps(lm: LanguageModel, tokens: Tensor) -> tuple[Family, dict[str, Tensor]]:
    """Transcoders that are exact on given tokens: one feature a token, and its MLP output as decoder row."""
    sites = [f"{kind}.{layer}" for layer in range(LAYERS) for kind in ("mlp_in", "mlp")]
    values = run(lm, tokens, torch.ones_like(tokens, dtype=torch.bool), capture=sites).sites
    flat = {site: value.flatten(0, 1) for site, value in values.items()}
    members = []
    for layer in range(LAYERS):
        x, y = flat[f"mlp_in.{layer}"], flat[f"mlp.{layer}"]
        members.append(nearest_token(f"mlp_in.{layer}", f"mlp.{layer}", x, y))
    return Family(tuple(members)), flat


def nearest_token(read: str, written: str, x: Tensor, y: Tensor) -> Dictionary:
    """One feature, of value 1, for each of the vectors: a solution of x·W + b that is 1 at it and below 0 elsewhere."""
    scale = 1e4
    # x_i·x_j − ‖x_i‖²/2 is largest for i = j; a steep slope keeps one feature a vector.
    W_enc, b_enc = scale * x, -scale * x.square().sum(dim=1) / 2
    top = (x @ W_enc.T + b_enc).max(dim=1).values
    return Dictionary(
        "topk",
        (read,),
        (written,),
        "topk",
        W_enc,
        b_enc,
        y / top[:, None],
        torch.zeros_like(y[0]),
        settings={"k": 1},
    )


@pytest.fixture
def lm(random_lm):
    return random_lm("llama", "float64")


TOKENS = torch.tensor([[5, 9, 2, 30, 17, 8], [40, 3, 3, 12, 7, 22]])


def test_exact_transcoders_lose_nothing_one_by_one_and_all_at_once(lm):
    family, flat = linear_mlps(lm, TOKENS)
    positions = torch.arange(6).repeat(2)
    made = family.reconstruct(family.encode(flat, positions), flat)
    torch.testing.assert_close(made["mlp.1"], flat["mlp.1"], rtol=1e-8, atol=1e-8)
    found = Replacements(family, together=True)
    found.add(lm, TOKENS)
    assert set(found.splices) == {"mlp.0", "mlp.1", ALL}
    for splice in found.splices.values():
        values = splice.values()
        assert values["delta_ce"] == pytest.approx(0, abs=1e-9)
        assert values["ce_recovered"] == pytest.approx(1, abs=1e-6)
        assert abs(values["ce_zero"] - values["ce_original"]) > 1e-4


def test_all_at_once_reads_the_changed_stream(lm):
    """Halved decoders in layer 0 move what layer 1 reads: its reconstruction follows."""
    family, _ = linear_mlps(lm, TOKENS)
    first = replace(family.members[0], W_dec=family.members[0].W_dec / 2)
    changed = Family((first, family.members[1]))
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    halved = run(
        lm,
        TOKENS,
        mask,
        replace={"mlp.0": lambda y: y / 2},
        capture=["mlp_in.1", "resid_mid.1"],
        stop_at="resid.1",
    )
    x = halved.sites["mlp_in.1"].flatten(0, 1)
    second = family.members[1]
    written = second.decode(second.encode(x, torch.arange(6).repeat(2))).view_as(halved.sites["resid_mid.1"])
    torch.testing.assert_close(all_replaced(lm, changed, TOKENS), halved.sites["resid_mid.1"] + written)


def test_skipped_tokens_keep_their_own_output(lm):
    family, _ = linear_mlps(lm, TOKENS)
    nothing = Family(tuple(replace(m, W_dec=0 * m.W_dec, skip=Skip(tuple(range(6)))) for m in family.members))
    found = Replacements(nothing, together=True)
    found.add(lm, TOKENS)
    for splice in found.splices.values():
        assert splice.values()["delta_ce"] == pytest.approx(0, abs=1e-12)
        assert splice.values()["kept_as_error_share"] == 1.0


def test_a_later_layer_is_written_by_every_member(lm):
    """The second site's output shared between both members of a cross-layer transcoder."""
    family, flat = linear_mlps(lm, TOKENS)
    positions = torch.arange(6).repeat(2)
    one, two = family.members
    half = flat["mlp.1"] / 2
    top = (flat["mlp_in.0"] @ one.W_enc.T + one.b_enc).max(dim=1).values
    across = replace(
        one,
        writes=("mlp.0", "mlp.1"),
        W_dec=torch.cat([one.W_dec, half / top[:, None]], 1),
        b_dec=torch.zeros(32).double(),
    )
    both = Family((across, replace(two, W_dec=two.W_dec / 2)))
    assert torch.equal(both.decoder(0, "mlp.1"), across.W_dec[:, 16:])
    made = both.reconstruct(both.encode(flat, positions), flat)
    torch.testing.assert_close(made["mlp.1"], flat["mlp.1"], rtol=1e-8, atol=1e-8)
    found = Replacements(both, together=True)
    found.add(lm, TOKENS)
    assert found.splices["mlp.1"].values()["delta_ce"] == pytest.approx(0, abs=1e-9)


def two_sites() -> Dictionary:
    """Reads (a, b) of width 1 each: one feature of value a + b, written as (f, 0); limits 3 and 5."""
    rows = torch.tensor([[1.0, 1.0]]), torch.zeros(1), torch.tensor([[1.0, 0.0]]), torch.zeros(2)
    sites = ("resid.0", "resid.1")
    notes = {"dead_share": 0.25}
    return Dictionary("topk", sites, sites, "topk", *rows, Skip((0,), max_norms=(3.0, 5.0)), {"k": 1}, notes)


def test_sums_by_hand():
    family = Family((two_sites(),))
    a, b = (
        torch.tensor([[9.0], [1.0], [2.0], [4.0], [1.0]]),
        torch.tensor([[1.0], [0.0], [1.0], [1.0], [6.0]]),
    )
    x, positions = {"resid.0": a, "resid.1": b}, torch.tensor([0, 1, 2, 1, 2])
    # skipped: the first by its position, the fourth as |a| > 3, the fifth as |b| > 5
    assert kept_tokens(family, x, positions).tolist() == [False, True, True, False, False]
    quality = FamilyQuality(family, 2)
    quality.add(x, positions, torch.tensor([0, 0, 0, 1, 1]))
    lines = {(line.quantity, line.site, line.tokens): line for line in quality.lines(10, 0)}
    # kept: a = (1, 2) reconstructed as (1, 3), b = (0, 1) as (0, 0)
    assert lines["fvu", "resid.0", "kept"].value == pytest.approx(1 / 0.5)
    assert lines["fvu", "resid.1", "kept"].value == pytest.approx(1 / 0.5)
    assert lines["fvu", "resid.0", "kept"].n == 2
    # all: skipped vectors are reconstructed as 0
    assert lines["fvu", "resid.0", "all"].value == pytest.approx(
        (81 + 0 + 1 + 16 + 1) / np.var([9, 1, 2, 4, 1]) / 5
    )
    assert lines["l0", "resid.0+resid.1", "kept"].value == 1.0
    assert lines["dead_share", "resid.0+resid.1", "weights"].value == 0.25
    assert lines["silent_share", "resid.0+resid.1", "kept"].value == 0.0
