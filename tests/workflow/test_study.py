"""The target study: several dictionaries of one site, of which only what is new is made."""

import pytest
import yaml

from circuitflow.config import Config
from circuitflow.store.tables import read_table
from tests.workflow.conftest import Clone

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


@pytest.mark.slow
def test_a_study_makes_its_tables_and_figures_and_a_further_variant_makes_only_its_own(
    finished: Clone,
) -> None:
    before = finished.config.read_text(encoding="utf-8")
    with finished.edited("run.yaml", before, before + STUDY):
        assert finished.planned() == {}, "a study is no part of the default target"
        done = finished.snakemake("--", "study")
        output = done.stdout + done.stderr
        folder = finished.root / "results/tiny/studies/kinds"
        same = "train_dictionary kinds/topk-k8-seed0 resid.1: kept from an earlier run"
        assert same in output, "the run's own dictionary is one of the variants"
        summary = (folder / "summary.txt").read_text(encoding="utf-8")
        assert summary in done.stdout, "the table is shown"
        for variant in ("topk-k4-seed0", "topk-k8-seed0", "jumprelu-l0_8-seed0"):
            assert variant in summary
        assert len(list((folder / "figures").rglob("*.png"))) == 6 + 3 * 4
        further = STUDY + "    - {kind: batchtopk, k: 8}\n"
        assert finished.planned("--", "study") == {"study": 1}, "only the table is shown again"
        with finished.edited("run.yaml", STUDY, further):
            assert finished.planned("--", "study") == ONE_VARIANT | OF_ALL_VARIANTS


@pytest.mark.slow
def test_a_dictionary_that_was_exported_comes_back_as_a_pretrained_one(finished: Clone) -> None:
    own = "results/tiny/dictionaries/topk-8/resid.1.json"
    exported = finished.circuitflow("convert", own, "exported", "--to", "sae_lens")
    assert exported.returncode == 0, exported.stderr
    source = "source: {format: sae_lens, path: exported}"
    study = f"\nstudy:\n  name: back\n  site: resid.1\n  variants: [{{kind: pretrained, {source}}}]\n"
    before = finished.config.read_text(encoding="utf-8")
    with finished.edited("run.yaml", before, before + study):
        values = yaml.safe_load(finished.config.read_text(encoding="utf-8"))
        (name,) = Config.model_validate(values).variants()
        imported = f"results/tiny/dictionaries/back/{name}/resid.1.quality.parquet"
        assert finished.planned("--", imported) == {"import_dictionary": 1, "measure_dictionary": 1}
        finished.snakemake("--", imported)
    there, back = (
        read_table(finished.root / path) for path in (own.replace(".json", ".quality.parquet"), imported)
    )
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
def test_a_study_that_is_not_configured_says_so(finished: Clone) -> None:
    failed = finished.snakemake("-n", "--", "study", check=False)
    assert failed.returncode != 0
    assert "The configuration has no section study" in failed.stderr + failed.stdout
