import pytest

from circuitflow.errors import UserError
from circuitflow.models.sites import KINDS, Site, depth_order, layer_of, parse_site


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_sites_correspond(kind: str) -> None:
    site = Site(kind) if kind == "embed" else Site(kind, 12)
    assert parse_site(str(site)) == site


def test_sites_sort_in_the_order_of_computation() -> None:
    names = [
        "resid.1",
        "mlp.0",
        "embed",
        "resid.0",
        "z.1",
        "attn.0",
        "mlp_in.0",
        "resid_mid.0",
        "z.0",
        "resid.10",
    ]
    ordered = [str(site) for site in sorted(map(parse_site, names))]
    assert ordered == [
        *(
            "embed",
            "z.0",
            "attn.0",
            "resid_mid.0",
            "mlp_in.0",
            "mlp.0",
            "resid.0",
            "z.1",
            "resid.1",
            "resid.10",
        )
    ]
    assert depth_order(parse_site("embed")) < depth_order(parse_site("z.0"))


def test_the_layer_of_a_site() -> None:
    assert layer_of("mlp_in.12") == 12
    with pytest.raises(UserError, match="'embed' has no layer"):
        layer_of("embed")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("residual.3", "did you mean 'resid'"),
        ("resid", "'resid.0'"),
        ("resid.", "counted from 0"),
        ("resid.-1", "counted from 0"),
        ("resid.03", "counted from 0"),
        ("resid.x", "counted from 0"),
        ("embed.0", "write 'embed'"),
        ("", "unknown kind"),
    ],
)
def test_a_name_that_is_no_site_is_explained(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_site(name)
