"""The target study: several dictionaries of one site, of which only what is new is made."""

import pytest
import yaml

from circuitflow.config import Config
from circuitflow.store.tables import read_table
from tests.workflow.conftest import Clone, copy_repository

STUDY = """
study:
  name: kinds
  site: resid.1
  features: 8
  variants:
    - {kind: topk, k: [4, 8]}
    - {kind: jumprelu, target_l0: 8.0}
"""
ONE_VARIANT = {
    "train_dictionary": 1,
    "measure_dictionary": 1,
    "study_features": 1,
    **{f"plot_variant_{name}": 1 for name in ("map", "heatmap", "correlation", "concepts")},
}
OF_ALL_VARIANTS = {
    "compare_variants": 1,
    **{
        f"plot_study_{name}": 1
        for name in ("training", "frontier", "weights", "firing", "emergence", "seeds")
    },
    "study": 1,
}


OWN = "results/tiny/dictionaries/topk-8/resid.1.json"
QUALITY = OWN.replace(".json", ".quality.parquet")


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy with one of the run's own dictionaries and its quality. Tests leave it as they found it."""
    clone = copy_repository(tmp_path_factory.mktemp("studied"))
    clone.snakemake("--", OWN, QUALITY)
    return clone


@pytest.mark.slow
def test_a_study_makes_its_tables_and_figures_and_a_further_variant_makes_only_its_own(
    studied: Clone,
) -> None:
    before = studied.config.read_text(encoding="utf-8")
    with studied.edited("run.yaml", before, before + STUDY):
        assert "study_features" not in studied.planned(), "a study is no part of the default target"
        done = studied.snakemake("--", "study")
        output = done.stdout + done.stderr
        folder = studied.root / "results/tiny/studies/kinds"
        same = "train_dictionary kinds/topk-k8-seed0 resid.1: kept from an earlier run"
        assert same in output, "the run's own dictionary is one of the variants"
        summary = (folder / "summary.txt").read_text(encoding="utf-8")
        assert summary in done.stdout, "the table is shown"
        for variant in ("topk-k4-seed0", "topk-k8-seed0", "jumprelu-l0_8-seed0"):
            assert variant in summary
        assert len(list((folder / "figures").rglob("*.png"))) == 6 + 3 * 4
        further = STUDY + "    - {kind: batchtopk, k: 8}\n"
        assert studied.planned("--", "study") == {"study": 1}, "only the table is shown again"
        with studied.edited("run.yaml", STUDY, further):
            assert studied.planned("--", "study") == ONE_VARIANT | OF_ALL_VARIANTS


@pytest.mark.slow
def test_a_dictionary_that_was_exported_comes_back_as_a_pretrained_one(studied: Clone) -> None:
    exported = studied.circuitflow("convert", OWN, "exported", "--to", "sae_lens")
    assert exported.returncode == 0, exported.stderr
    source = "source: {format: sae_lens, path: exported}"
    study = f"\nstudy:\n  name: back\n  site: resid.1\n  variants: [{{kind: pretrained, {source}}}]\n"
    before = studied.config.read_text(encoding="utf-8")
    with studied.edited("run.yaml", before, before + study):
        values = yaml.safe_load(studied.config.read_text(encoding="utf-8"))
        (name,) = Config.model_validate(values).variants()
        imported = f"results/tiny/dictionaries/back/{name}/resid.1.quality.parquet"
        assert studied.planned("--", imported) == {"import_dictionary": 1, "measure_dictionary": 1}
        studied.snakemake("--", imported)
    there, back = (read_table(studied.root / path) for path in (QUALITY, imported))
    held = {"fvu", "l0", "ce_recovered"}
    values = [
        {
            (quantity, tokens): value
            for quantity, tokens, value in zip(
                table["quantity"], table["tokens"], table["value"], strict=True
            )
            if quantity in held
        }
        for table in (there, back)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.slow
def test_a_study_that_is_not_configured_says_so(studied: Clone) -> None:
    failed = studied.snakemake("-n", "--", "study", check=False)
    assert failed.returncode != 0
    assert "The configuration has no section study" in failed.stderr + failed.stdout
