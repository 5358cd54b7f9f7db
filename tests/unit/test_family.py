"""Families of dictionaries: what members write adds up, files, and which wirings can be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from circuitflow.dictionaries.dictionary import Dictionary, Skip, load_dictionary, save_dictionary
from circuitflow.dictionaries.family import Family, load_family, save_family
from circuitflow.dictionaries.formats.families import read_family, write_family
from circuitflow.dictionaries.formats.registry import write_dictionary
from circuitflow.dictionaries.wiring import Wiring, cross_layer, crosscoder, transcoder
from circuitflow.errors import UserError
from circuitflow.models.sites import in_depth_order
from circuitflow.store.objects import Manifest

D = 3


def member(reads: tuple[str, ...], writes: tuple[str, ...], seed: int, skip: bool = False) -> Dictionary:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    d_in, d_out = D * len(reads), D * len(writes)
    weights = normal(8, d_in), normal(8), normal(8, d_out), normal(d_out)
    limits = Skip((0,), max_norms=(4.0,) * len(reads)) if len(reads) > 1 else Skip((0,), 4.0)
    W_skip = normal(d_out, d_in) if skip else None
    return Dictionary("topk", reads, writes, "topk", *weights, limits, {"k": 2}, W_skip=W_skip)


@pytest.fixture
def cross() -> Family:
    return Family((member(("mlp_in.0",), ("mlp.0", "mlp.1"), 0, True), member(("mlp_in.1",), ("mlp.1",), 1)))


def vectors(*sites: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    return {site: torch.randn(5, D, generator=draw, dtype=torch.float64) for site in sites}


def test_what_members_write_to_one_site_adds_up(cross: Family):
    x, positions = vectors("mlp_in.0", "mlp_in.1"), torch.arange(5)
    codes = cross.encode(x, positions)
    made = cross.reconstruct(codes, x)
    assert (cross.reads, cross.writes) == (("mlp_in.0", "mlp_in.1"), ("mlp.0", "mlp.1"))
    one, two = cross.members
    f, g = codes[0].dense(), codes[1].dense()
    first = f @ one.W_dec + one.b_dec + x["mlp_in.0"] @ one.W_skip.T
    torch.testing.assert_close(made["mlp.0"], first[:, :D])
    torch.testing.assert_close(made["mlp.1"], first[:, D:] + g @ two.W_dec + two.b_dec)
    assert not f[0].any()  # the first position is skipped
    assert torch.equal(cross.decoder(0, "mlp.1"), one.W_dec[:, D:])
    assert cross.decoder(0, "mlp.1").data_ptr() == one.W_dec[:, D:].data_ptr()
    with pytest.raises(ValueError, match=r"member 1 writes mlp\.1, not mlp\.0"):
        cross.decoder(1, "mlp.0")


def test_a_crosscoder_reads_its_sites_side_by_side():
    sites = ("base:resid.2", "tuned:resid.2")
    family, x = Family((member(sites, sites, 3),)), vectors(*sites)
    codes = family.encode(x, torch.arange(5))
    joined = torch.cat([x[site] for site in sites], dim=1)
    assert torch.equal(codes[0].dense(), family.members[0].encode(joined, torch.arange(5)).dense())
    torch.testing.assert_close(
        family.reconstruct(codes)["tuned:resid.2"], family.members[0].decode(codes[0])[:, D:]
    )
    with pytest.raises(UserError, match=r"^Vectors at tuned:resid\.2 are needed to encode"):
        family.encode({sites[0]: x[sites[0]]}, torch.arange(5))


def test_each_site_has_a_limit_of_its_own():
    skip = Skip((), max_norms=(3.0, None))
    x = torch.tensor([[3.5, 0.0, 0.0, 0.0], [2.0, 2.0, 9.0, 0.0], [3.0, 0.0, 99.0, 0.0]])
    assert skip.mask(x, torch.arange(3)).tolist() == [True, False, False]
    assert Skip.of(skip.described()) == skip
    assert Skip((0,), 2.0).described() == {"positions": [0], "max_norm": 2.0}  # as files had it before


def test_families_survive_their_files(cross: Family, tmp_path: Path):
    folder = tmp_path / "objects" / "abc"
    save_family(folder, cross)
    assert sorted(file.name for file in folder.iterdir()) == ["member_0.safetensors", "member_1.safetensors"]
    manifest = tmp_path / "cross_layer.json"
    Manifest("dictionary", "abc", "c", {}, {}).write(manifest)
    loaded = load_family([manifest])
    for before, after in zip(cross.members, loaded.members, strict=True):
        assert torch.equal(before.W_dec, after.W_dec)
        assert (before.reads, before.writes, before.skip) == (after.reads, after.writes, after.skip)
    save_dictionary(tmp_path / "b.safetensors", cross.members[1])
    save_dictionary(tmp_path / "a.safetensors", replace(cross.members[0], reads=("mlp_in.10",)))
    deep_first = load_family([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert deep_first.reads == ("mlp_in.1", "mlp_in.10")
    save_family(tmp_path / "single", Family(cross.members[:1]))
    assert load_dictionary(tmp_path / "single" / "weights.safetensors").writes == ("mlp.0", "mlp.1")
    with pytest.raises(UserError, match="No dictionary was named"):
        load_family([])


def test_two_members_that_read_one_site_are_refused(cross: Family, tmp_path: Path):
    first, second = tmp_path / "a" / "mlp_in.1.safetensors", tmp_path / "b" / "mlp_in.1.safetensors"
    for path in (first, second):
        save_dictionary(path, cross.members[1])
    with pytest.raises(UserError, match=rf"{first} and {second} both read mlp_in\.1.*; name one dictionary"):
        load_family([first, second])
    with pytest.raises(UserError, match=r"both read mlp_in\.1"):
        read_family("circuitflow", tmp_path)
    for name in ("e", "f"):
        write_dictionary("circuit_tracer", tmp_path / "c" / name, cross.members[1])
    with pytest.raises(UserError, match=r"e/layer_1\.safetensors and .*f/layer_1\.safetensors both read"):
        read_family("circuit_tracer", tmp_path / "c")
    with pytest.raises(UserError, match=r"d/mlp_in\.1\.safetensors has been written already: two"):
        write_family("circuitflow", tmp_path / "d", Family(cross.members[1:] * 2))


def test_checkpoints_are_no_members(cross: Family, tmp_path: Path):
    save_family(tmp_path, cross)
    save_family(tmp_path / "checkpoints" / "step_5", cross)
    save_dictionary(tmp_path / "checkpoints" / "step_7.safetensors", cross.members[1])
    assert len(read_family("circuitflow", tmp_path).members) == 2
    assert len(read_family("circuitflow", tmp_path / "checkpoints" / "step_5").members) == 2


def test_sites_of_two_models_keep_the_order_of_their_names():
    assert in_depth_order(["tuned:resid.3", "base:resid.3", "resid.10", "mlp.3"]) == [
        "mlp.3", "tuned:resid.3", "base:resid.3", "resid.10",
    ]  # fmt: skip


def test_wirings():
    across = Wiring.of(cross_layer([5, 3]))
    assert [m.writes for m in across.members] == [("mlp.3", "mlp.5"), ("mlp.5",)]
    assert across.sites == ("mlp_in.3", "mlp_in.5", "mlp.3", "mlp.5")
    assert across.name == "mlp_in.3, mlp_in.5 → mlp.3, mlp.5"
    assert Wiring.of(cross_layer(range(9))).name == "mlp_in.0 … mlp_in.8 → mlp.0 … mlp.8"
    own = Wiring.of(crosscoder(["resid.4", "resid.2"]))
    assert (own.same, own.sites) == (True, ("resid.2", "resid.4"))
    assert Wiring.of(transcoder(7)).name == "mlp_in.7 → mlp.7"


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([], "needs at least one site"),
        ([[["resid.1"], []]], "needs at least one site"),
        ([[["resid.1"], ["resid.1", "resid.2"]]], "the same sites or have none in common"),
        ([[["mlp_in.0"], ["mlp.0"]], [["mlp_in.1"], ["mlp.1"]]], "writes its own layer and all later ones"),
        ([[["mlp_in.x"], ["mlp.0"]]], "needs a layer, counted from 0"),
    ],
)
def test_wirings_that_cannot_be(members, sentence):
    with pytest.raises(UserError, match=sentence):
        Wiring.of(members)
