"""The configuration: ready-made files are valid, and every mistake gives one telling sentence."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from circuitflow.config import json_schema
from circuitflow.config_checks import check_against_model, parse_config
from circuitflow.errors import UserError
from circuitflow.store.objects import Manifest

ROOT = Path(__file__).parents[2]
DEFAULT = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))


def put(path: str, value: Any) -> Callable[[dict], None]:
    *parents, last = path.split("/")

    def edit(config: dict) -> None:
        for part in parents:
            config = config[int(part)] if isinstance(config, list) else config[part]
        config[last] = value

    return edit


@pytest.mark.parametrize(
    "file", ["config.yaml", *sorted(f"configs/{p.name}" for p in (ROOT / "configs").iterdir())]
)
def test_ready_made_configurations_are_valid(file: str) -> None:
    config = parse_config(yaml.safe_load((ROOT / file).read_text(encoding="utf-8")))
    assert config.sites


STUDY = {"name": "kinds", "site": "resid.12", "seeds": [0, 1], "variants": [{"kind": "topk", "k": [16, 32]}]}

TEXT = {
    "name": "text",
    "pairs": {"kind": "text", "train": 20, "test": 10, "length": 8},
    "metric": {"kind": "logit"},
}
BUNDLED = [{"kind": "bundled", "tokens": 5000}]


def text(**changes: Any) -> Callable[[dict], None]:
    """A valid configuration of contexts of text, but for the changes of its task."""

    def edit(config: dict) -> None:
        config["task"] = {**copy.deepcopy(TEXT), **changes}
        config["corpus"]["sources"] = BUNDLED

    return edit


def diffing(**values: Any) -> Callable[[dict], None]:
    """A section on model diffing with these values."""
    tuning = {"text": {"kind": "task"}}
    return put("diffing", {"site": "resid.12", "tuning": tuning, **values})


def second(source: dict[str, Any]) -> Callable[[dict], None]:
    """Model diffing with a second model from elsewhere."""
    return put("diffing", {"site": "resid.12", "model": source})


def transcoders(source: dict[str, Any]) -> Callable[[dict], None]:
    """Transcoders from elsewhere."""
    return put("transcoders", {"name": "theirs", "kind": "pretrained", "layers": [3], "source": source})


def test_contexts_of_text_need_no_more_than_their_number_and_length() -> None:
    config = copy.deepcopy(DEFAULT)
    text(clusters={"site": "resid.12"})(config)
    task = parse_config(config).task
    assert task.pairs.kind == "text"
    assert task.clusters is not None
    assert (task.clusters.by, task.clusters.count) == ("gradients", 4)


MISTAKES = [
    (
        put("task", TEXT),
        "Key corpus.sources has kind task, but pairs of kind text come from the corpus",
    ),
    (
        text(metric={}),
        "Key task.metric.kind is logit_difference, but contexts of kind text have no wrong answer; use logit or",
    ),
    (
        text(metric={"kind": "kl"}),
        "Key task.metric.kind is kl, but contexts of kind text have no patched prompt; use logit or",
    ),
    (
        text(metric={"kind": "logit", "position": 3}),
        "Key task.metric.position is 3, but contexts of kind text are",
    ),
    (text(chat_template=True), "Key task.chat_template is True, but contexts of kind text are"),
    (text(pairs={"kind": "text", "len": 3}), "Unknown key task.pairs.len; did you mean 'length'?"),
    (
        text(clusters={"site": "resid.13"}),
        "Key task.clusters.site is resid.13, which is not in sites; did you mean 'resid.1",
    ),
    (
        put("task/clusters", {"site": "resid.12", "count": 1}),
        "Key task.clusters.count is 1, but it should be",
    ),
    (put("colour", 1), "Unknown key colour;"),
    (put("dictionaries/kk", 3), "Unknown key dictionaries.kk; did you mean 'k'?"),
    (put("dictionaries/k", "a"), "Key dictionaries.k is 'a', but it should be a valid integer."),
    (put("dictionaries/k", 9999), "more than its d_dict of 4608; lower k or raise d_dict"),
    (put("dictionaries/kind", "topkk"), "Key dictionaries.kind is topkk; did you mean 'topk'?"),
    (put("dictionaries/training/learning_rate", "1e-3"), "(YAML reads 3e-4 as text: write 3.0e-4)"),
    (
        put("dictionaries/training/learning_rate", "nan"),
        "learning_rate is 'nan', but it should be a valid number.",
    ),
    (
        put("dictionaries/overrides", {"resid.13": {"k": 3}}),
        "Key dictionaries.overrides.resid.13 names a site",
    ),
    (
        put("dictionaries/overrides", {"resid.12": {"kk": 3}}),
        "Unknown key dictionaries.overrides.resid.12.kk; did you mean 'k'?",
    ),
    (put("sites", []), "Key sites is empty; name at least one."),
    (put("sites", ["resid.x"]), "Site 'resid.x' needs a layer"),
    (put("sites", ["residd.3"]), "did you mean 'resid'?"),
    (put("sites", ["resid.3", "resid.3"]), "Key sites lists resid.3 more than once"),
    (put("task/name", "dictionaries"), "Key task.name is dictionaries, the name of a folder"),
    (put("dictionaries/name", "cluster-0"), "Key dictionaries.name is cluster-0, the name of a folder"),
    (put("sites", ["mlp_in.3"]), "Key sites has mlp_in.3, which is only read, by transcoders"),
    (put("model/architecture", "lama"), "did you mean 'llama'?"),
    (put("model/source/kind", "whel"), "Key model.source.kind is whel; did you mean 'wheel'?"),
    (put("model/source/sha", "x"), "Unknown key model.source.sha; did you mean 'sha256'?"),
    (
        put("model/source", {"kind": "path", "path": "configz"}),
        "Key model.source.path names configz, which does not exist",
    ),
    (
        put("circuit/nodes", {"top": 3, "threshold": 0.1}),
        "exactly one of top, threshold, percentile, sparsity, zscore, effect_share and faithfulness is needed",
    ),
    (put("circuit/edges", {"faithfulness": 0.8}), "Unknown key circuit.edges.faithfulness"),
    (put("scores/compare", ["atp", "atp"]), "compare needs at least two methods, each once"),
    (
        put("task/pairs", {"kind": "import", "train": "x.jsonl", "test": "y"}),
        "Key task.pairs.train names x.jsonl",
    ),
    (put("corpus/sources/0/token", 1), "Unknown key corpus.sources.0.token; did you mean 'tokens'?"),
    (put("corpus/sources", [{"kind": "files", "glob": "nowhere/*.txt", "tokens": 5}]), "matches no file"),
    (put("activations/shard_rows", 1000), "not a multiple of corpus.block (128); try 896"),
    (put("dictionaries/kind", "pretrained"), "Key dictionaries.source is missing for resid.6"),
    (
        put("dictionaries/source", {"format": "sae_lense", "path": "x"}),
        "Key dictionaries.source.format is sae_lense; did you mean 'sae_lens'?",
    ),
    (
        put("dictionaries/training/skip_positions", [0, 128]),
        "has 128, but a block has 128 positions, 0 to 127",
    ),
    (put("dictionaries/source", {"format": "sae_lens"}), "a path on disk, or the id of a hub repository"),
    (put("dictionaries/source", {"format": "sae_lens", "id": "a/b"}), "id and revision"),
    (
        put("dictionaries/source", {"format": "sparsify", "path": "config.yam"}),
        "Key dictionaries.source.path names config.yam, which does not exist; did you mean 'config.yaml'?",
    ),
    (
        lambda config: config["dictionaries"].update(kind="matryoshka", prefixes=[0.5, 0.25]),
        "in ascending order that end with 1.0",
    ),
    (put("study", {**STUDY, "site": "resid.13"}), "Key study.site is resid.13, which is not in sites"),
    (put("study", {**STUDY, "name": "topk-32"}), "the name of the dictionaries too"),
    (
        put("study", {**STUDY, "variants": [{"kind": "topk", "kk": [1]}]}),
        "Unknown key study.variants.0.kk; did you mean 'k'?",
    ),
    (put("study", {**STUDY, "variants": [{"k": []}]}), "Key study.variants.0 has an empty list of values"),
    (
        put("study", {**STUDY, "variants": [{"k": [16, 5000]}]}),
        "for variant topk-k5000-seed0, more than its d_dict",
    ),
    (lambda config: config.pop("task"), "Key task is missing"),
    (put("recompute", "train_dict"), "Key recompute names train_dict, which is not a stage; did you mean"),
    (put("plots/palette", {"positve": "red"}), "did you mean 'positive'?"),
    (put("circuit/nodes", {"zscore": float("inf")}), "circuit.nodes.zscore"),
    (put("model/name", "a/b"), "only letters, digits"),
    (put("model/source", {"kind": "toy", "heads": 5}), "use a multiple of 10"),
    (put("effects", {"multiples": []}), "multiples and values are both empty"),
    (put("effects", {"nodes": ["resid.12"]}), "not written as a node"),
    (put("effects", {"nodes": ["resid.11/3"]}), "whose site is not in sites; did you mean 'resid.1"),
    (put("effects", {"curves": ["resid.12/999999"]}), "resid.12/999999, but the dictionary of resid.12 has"),
    (put("effects", {"curves": ["resid.12/error"]}), "has no value to scale"),
    (put("error_nodes/ranges", [["resid.18", "resid.6"]]), "write [resid.6, resid.18]"),
    (put("error_nodes/restore_ranges", [["resid.18", "resid.6"]]), "Key error_nodes.restore_ranges has"),
    (
        put("error_nodes/ranges", [["resid.6"]]),
        "Key error_nodes.ranges.0 is ['resid.6']; it takes at least 2 entries, a range its first and last site.",
    ),
    (
        put("crosscoder/sites", ["resid.6"]),
        "Key crosscoder.sites is ['resid.6']; it takes at least 2 entries.",
    ),
    (diffing(shared=[0.3]), "Key diffing.shared is [0.3]; it takes at least 2 entries."),
    (diffing(shared=[0.3, 0.5, 0.7]), "Key diffing.shared is [0.3, 0.5, 0.7]; it takes at most 2 entries."),
    (diffing(shared=[0.7, 0.3]), "Key diffing.shared is [0.7, 0.3], but the two bounds should ascend"),
    (diffing(tuning=None), "Key diffing: name a second model (model), or how"),
    (
        put("crosscoder/sites", ["resid.6"] * 2),
        "Key crosscoder.sites is ['resid.6', 'resid.6'], but it should",
    ),
    (put("transcoders/layers", []), "Key transcoders.layers is [], but it should name each layer once"),
    (
        put("transcoders/layers", [0, 0]),
        "Key transcoders.layers is [0, 0], but it should name each layer once",
    ),
    (
        put("transcoders/kind", "pretrained"),
        "Key transcoders: kind pretrained and source belong together.",
    ),
    (
        put("transcoders/training/resample_every", 5),
        "Key transcoders.training.resample_every is 5, but new features would be drawn",
    ),
    (
        put("transcoders/overrides", {3: {"kk": 2}}),
        "Unknown key transcoders.overrides.3.kk; did you mean 'k'? valid: bandwidth, d_dict, dead",
    ),
    (
        put("transcoders/overrides", {3: {"training": {"epoch": 2}}}),
        "Unknown key transcoders.overrides.3.training.epoch; did you mean 'epochs'?",
    ),
    (
        put("transcoders/overrides", {3: {"k": 0}}),
        "Key transcoders.overrides.3.k is 0, but it should be greater",
    ),
    (
        put(
            "transcoders/overrides", {3: {"kind": "pretrained", "source": {"format": "decoder", "path": "x"}}}
        ),
        "Key transcoders.overrides.3.kind is 'pretrained', but overrides cannot",
    ),
    (
        lambda config: config["transcoders"].update(
            architecture="cross_layer", kind="jumprelu", target_l0=4.0
        ),
        "Key transcoders.target_l0 is 4.0, but cross_layer jumprelu aims at no L0; remove it, and set penalty.",
    ),
    (
        put("dictionaries/overrides", {"resid.12": {"source": {"path": "x"}}}),
        "Key dictionaries.overrides.resid.12.source.format is missing; add it (config.schema.json lists every key).",
    ),
    (
        put("dictionaries/overrides", {"resid.12": {"overrides": {}}}),
        "Unknown key dictionaries.overrides.resid.12.overrides; valid: bandwidth,",
    ),
    (put("dictionaries/source", {"format": "decoder", "path": 3}), "Key dictionaries.source.path is 3, but"),
    (put("model/source", {"kind": "path", "path": 3}), "Key model.source.path is 3, but"),
    (
        put("model/source", {"kind": "path", "path": "qqqqqqqqqqqq"}),
        "names qqqqqqqqqqqq, which does not exist.",
    ),
    (
        second({"kind": "hub", "id": "a/b"}),
        "Key diffing.model.revision is missing; add it (config.schema.json",
    ),
    (
        diffing(tuning={"text": {"kind": "task", "answers": "rigt"}}),
        "Key diffing.tuning.text.answers is rigt; did you mean 'right'?",
    ),
    (
        diffing(tuning={"text": {"kind": "task", "answer": "right"}}),
        "Unknown key diffing.tuning.text.answer; did",
    ),
    (put("task/metric", {"position": "lasst"}), "Key task.metric.position is lasst; did you mean 'last'?"),
    (put("seed", {f"key-{number}": number for number in range(50)}), "…, but it should be a valid integer."),
    (put("error_nodes/kinds", ["residual"]), "Key error_nodes.kinds.0 is 'residual'; did you mean 'resid'?"),
    (put("error_nodes/baselines", ["nearst"]), "did you mean 'nearest'?"),
    (put("comparison/others", {"b": "results/no/such"}), "names results/no/such, which does not exist"),
    (put("comparison/others", {"b": "resources"}), "which has no values.parquet"),
    (put("comparison/contenders", [{"name": "b", "method": "atp"}]), "has b, which is the run itself"),
    (
        put("comparison/contenders", [{"name": "b", "dictionaries": {"kind": "topk"}}]),
        "has b, which is the run itself",
    ),
    (
        put(
            "comparison/contenders",
            [{"name": "b", "dictionaries": {"training": {"skip_positions": [9999]}}}],
        ),
        "skip_positions of contender b at resid.6 has 9999",
    ),
    (
        lambda config: (text()(config), put("evaluation/ablation", "patched")(config)),
        "Key evaluation.ablation is patched, but contexts of kind text",
    ),
    (put("task", None), "Key task.name is missing"),
    (
        put("dictionaries/training/k_start", 8),
        "Key dictionaries.training.k_start is 8; choose a number from k, which is 32, to d_dict, which is 4608",
    ),
    (diffing(k=9, d_dict=8), "Key diffing.k is 9; choose a number from 1 to d_dict, which is 8"),
    (
        diffing(training={"k_start": 8}),
        "Key diffing.training.k_start is 8; choose a number from k, which is 32",
    ),
    (diffing(kind="jumprelu", target_l0=9000.0), "Key diffing.target_l0 is 9000.0, more than d_dict"),
    (
        diffing(training={"skip_positions": [128]}),
        "Key diffing.training.skip_positions has 128, but a block has",
    ),
    (put("crosscoder/k", 9999), "Key crosscoder.k is 9999; choose a number from 1 to d_dict"),
    (put("crosscoder/training", {"k_start": 1}), "Key crosscoder.training.k_start is 1; choose"),
    (put("transcoders/k", 9999), "Key transcoders.k is 9999; choose a number from 1 to d_dict"),
    (put("transcoders/overrides", {3: {"k": 9999}}), "Key transcoders.overrides.3.k is 9999; choose"),
    (
        diffing(tuning={"text": {"kind": "files", "glob": "nowhere/*.txt"}}),
        "Key diffing.tuning.text.glob has the pattern nowhere/*.txt, which matches no file",
    ),
    (
        second({"kind": "path", "path": "configz"}),
        "Key diffing.model.path names configz, which does not exist",
    ),
    (second({"kind": "path", "path": "configs"}), "diffing.model.path 'configs' holds no config.json"),
    (
        put("model/source", {"kind": "path", "path": "configs"}),
        "model.source.path 'configs' holds no config.json",
    ),
    (
        transcoders({"format": "circuit_tracer", "path": "configz"}),
        "Key transcoders.source.path names configz, which does not exist; did you mean 'configs'?",
    ),
    (
        transcoders({"format": "circuit_tracer", "path": "configs"}),
        "No dictionary of format circuit_tracer is",
    ),
]


@pytest.mark.parametrize(("edit", "telling"), MISTAKES, ids=[telling for _, telling in MISTAKES])
def test_a_mistake_gives_one_sentence(edit: Callable[[dict], None], telling: str) -> None:
    config = copy.deepcopy(DEFAULT)
    edit(config)
    with pytest.raises(UserError) as caught:
        parse_config(config)
    sentence = str(caught.value)
    assert telling in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_a_section_that_is_left_empty_has_its_defaults() -> None:
    config = copy.deepcopy(DEFAULT)
    for name in ("effects", "comparison", "audit", "plots", "error_nodes"):
        config[name] = None
    parsed = parse_config(config)
    assert parsed.effects.top == 3
    assert parsed.error_nodes.widths == [1, 2, 4]


def test_a_site_beyond_a_known_depth_is_refused_before_any_job() -> None:
    config = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text(encoding="utf-8"))
    config["sites"] = ["resid.0", "resid.7"]
    with pytest.raises(UserError, match=r"resid\.7, but model tiny has 4 layers; the deepest is resid\.3"):
        parse_config(config)


def test_a_site_beyond_a_model_that_is_on_disk_is_refused_before_any_job(tmp_path: Path) -> None:
    config = parse_config(DEFAULT)
    manifest = tmp_path / "manifest.json"
    check_against_model(config, manifest)
    details = {"architecture": "llama", "layers": 20}
    source = config.model.source.model_dump()
    other = {"params": {"source": {**source, "version": "another"}}}
    Manifest("model", "f" * 16, "c", other, details).write(manifest)
    check_against_model(config, manifest)
    Manifest("model", "f" * 16, "c", {"params": {"source": source}}, details).write(manifest)
    with pytest.raises(UserError, match=r"resid\.24"):
        check_against_model(config, manifest)


def test_sites_of_crosscoders_are_checked_against_models_on_disk_too(tmp_path: Path) -> None:
    values = copy.deepcopy(DEFAULT)
    second({"kind": "hub", "id": "a/b", "revision": "c"})(values)
    values["crosscoder"]["sites"] = ["resid.6", "resid.12"]
    config = parse_config(values)
    first = tmp_path / "m" / "model" / "manifest.json"
    other = tmp_path / "m" / "diffing" / "diffing" / "model" / "manifest.json"

    def has(manifest: Path, source: Any, layers: int) -> None:
        details = {"architecture": "llama", "layers": layers}
        provenance = {"params": {"source": source.model_dump()}}
        Manifest("model", "f" * 16, "c", provenance, details).write(manifest)

    assert config.diffing is not None
    has(first, config.model.source, 30)
    has(other, config.diffing.model, 13)
    check_against_model(config, first)
    has(other, config.diffing.model, 12)
    with pytest.raises(UserError, match=r"'resid\.12' is beyond"):
        check_against_model(config, first)
    values["crosscoder"]["sites"] = ["resid.6", "resid.30"]
    with pytest.raises(UserError, match=r"'resid\.30' is beyond"):
        check_against_model(parse_config(values), first)


def test_transcoders_of_all_layers_are_looked_for_once_the_depth_is_known(tmp_path: Path) -> None:
    values = copy.deepcopy(DEFAULT)
    for layer in range(29):
        (tmp_path / f"layer_{layer}.safetensors").touch()
    transcoders({"format": "circuit_tracer", "path": str(tmp_path)})(values)
    values["transcoders"]["layers"] = None
    config = parse_config(values)
    manifest = tmp_path / "model" / "manifest.json"
    for layers in (29, 30):
        source = {"params": {"source": config.model.source.model_dump()}}
        details = {"architecture": "llama", "layers": layers}
        Manifest("model", "f" * 16, "c", source, details).write(manifest)
        if layers == 29:
            check_against_model(config, manifest)
    with pytest.raises(UserError, match="dictionaries of format circuit_tracer"):
        check_against_model(config, manifest)


def test_overrides_change_one_site_and_keep_the_rest() -> None:
    config = copy.deepcopy(DEFAULT)
    config["dictionaries"]["overrides"] = {"resid.12": {"k": 64, "training": {"epochs": 2.0}}}
    parsed = parse_config(config)
    assert parsed.dictionary("resid.12").k == 64
    assert parsed.dictionary("resid.12").training.epochs == 2.0
    assert parsed.dictionary("resid.12").training.batch == 1024
    assert parsed.dictionary("resid.6").k == 32


def test_a_study_has_a_variant_for_each_combination_and_seed() -> None:
    config = copy.deepcopy(DEFAULT)
    relu = {"kind": "relu", "penalty": 0.03, "seed": 5}
    config["study"] = {**STUDY, "variants": [*STUDY["variants"], relu]}
    config["dictionaries"]["overrides"] = {"resid.12": {"d_dict": 1152}}
    variants = parse_config(config).variants()
    topk = [f"topk-{k}-seed{seed}" for seed in (0, 1) for k in ("k16", "k32")]
    assert list(variants) == [*topk, "relu-p0.03-seed5"]
    assert variants["topk-k16-seed1"].k == 16
    assert variants["topk-k16-seed1"].seed == 1
    assert variants["relu-p0.03-seed5"].penalty == 0.03
    assert {variant.d_dict for variant in variants.values()} == {1152}  # what else the site's dictionary has
    assert parse_config(DEFAULT).model_copy(update={"study": None}).variants() == {}


def test_lists_that_are_one_value_and_keys_of_training_make_labels_too() -> None:
    config = copy.deepcopy(DEFAULT)
    variant = {"kind": "matryoshka", "prefixes": [0.25, 1.0], "training": {"epochs": [1.0, 2.5]}}
    config["study"] = {**STUDY, "seeds": [3], "variants": [variant]}
    variants = parse_config(config).variants()
    assert list(variants) == [f"matryoshka-prefixes0.25_1.0-epochs{value}-seed3" for value in ("1", "2.5")]
    assert variants["matryoshka-prefixes0.25_1.0-epochs2.5-seed3"].training.epochs == 2.5


def test_the_schema_for_editors_is_current() -> None:
    written = json.loads((ROOT / "config.schema.json").read_text(encoding="utf-8"))
    assert written == json_schema(), "run `make schema`"


def test_every_key_is_documented() -> None:
    schema = json_schema()
    nameless = [
        f"{name}.{key}"
        for name, section in schema["$defs"].items()
        for key, value in section.get("properties", {}).items()
        if "description" not in value and "const" not in value
    ]
    assert nameless == []
