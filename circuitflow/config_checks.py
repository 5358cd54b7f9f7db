"""Reading a configuration: every mistake is told in one sentence, before any job starts."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from circuitflow.config import Config, ImportedPairs, TaskSentences, TextFiles, TextPairs
from circuitflow.config_base import Section
from circuitflow.config_checks_experiments import check_experiments
from circuitflow.config_checks_graphs import check_graph_layers
from circuitflow.config_checks_spanning import check_positions, check_spanning, check_transcoder_files
from circuitflow.config_dictionaries import DictionarySettings
from circuitflow.config_diffing import TuningFiles
from circuitflow.config_model import PathSource, ToySource
from circuitflow.config_sentences import sentence_of
from circuitflow.dictionaries.formats.places import local_files
from circuitflow.dictionaries.settings import Settings, check_values, used_settings
from circuitflow.errors import UserError, nearest
from circuitflow.models.architectures import ARCHITECTURES, check_site
from circuitflow.models.fetching import local_files as model_files
from circuitflow.models.sites import parse_site
from circuitflow.store.objects import read_manifest

SCRIPTS = Path(__file__).parents[1] / "workflow_scripts"
OF_MODEL = {"model", "corpus", "activations", "dictionaries", "studies", "objects", "graphs", "diffing"}
OF_TASK = {
    "pairs",
    "tokens",
    "confident",
    "gradients",
    "gradients.ig",
    "gradients.relp",
    "figures",
    "compare",
}


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate a configuration.

    :raises UserError: the first mistake, as one sentence with the key's path and the nearest valid choice.
    """
    try:
        config = Config.model_validate(_without_empty(values))
    except ValidationError as error:
        raise UserError(sentence_of(error, [], values)) from None
    _check_names(config)
    _check_overrides(config)
    _check_sites(config)
    _check_text(config)
    _check_clusters(config)
    _check_dictionaries(config)
    _check_study(config)
    _check_contenders(config)
    check_experiments(config)
    check_spanning(config, OF_MODEL)
    check_graph_layers(config)
    _check_sizes(config)
    _check_files(config)
    _check_stages(config)
    return config


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections that are left empty (``effects:`` and nothing below) take their defaults."""

    def section(key: str) -> bool:
        field = Config.model_fields.get(key)
        kind = None if field is None else field.annotation
        return isinstance(kind, type) and issubclass(kind, Section)

    return {key: {} if value is None and section(key) else value for key, value in values.items()}


def check_against_model(config: Config, manifest: Path) -> None:
    """Check the sites against a model that has been prepared before, and that of model diffing against a second one.

    A model that is not on disk, or was made from another source, is checked by the stage that prepares it, with the
    same sentence.

    :raises UserError: the model lacks a site.
    """
    diffing = config.diffing
    sites = [*config.sites, *(config.crosscoder.sites if config.crosscoder else [])]
    sites += [diffing.site] if diffing else []
    layers = _check_prepared(manifest, config.model.source, sites)
    if layers is not None:
        check_transcoder_files(config, layers)
        check_graph_layers(config, layers)
    if diffing is not None and diffing.model is not None:
        second = manifest.parents[1] / "diffing" / diffing.name / "model" / "manifest.json"
        _check_prepared(second, diffing.model, [diffing.site])


def _check_prepared(manifest: Path, source: Section, sites: Sequence[str]) -> int | None:
    """Check sites against a prepared model and give the number of its layers; nothing if it is not there."""
    if not manifest.is_file():
        return None
    prepared = read_manifest(manifest, "model")
    if prepared.provenance["params"]["source"] != source.model_dump():
        return None
    details = prepared.details
    for site in sites:
        check_site(parse_site(site), ARCHITECTURES[details["architecture"]], details["layers"])
    return int(details["layers"])


def _check_names(config: Config) -> None:
    """Names that are folders of stages."""
    for key, name, taken in (
        ("task.name", config.task.name, OF_MODEL),
        ("dictionaries.name", config.dictionaries.name, OF_TASK),
    ):
        if name in taken or (key == "dictionaries.name" and name.startswith("cluster-")):
            raise UserError(
                f"Key {key} is {name}, the name of a folder that stages write to; choose another."
            )


def _check_sites(config: Config) -> None:
    for site in config.sites:
        if parse_site(site).kind == "mlp_in":
            raise UserError(
                f"Key sites has {site}, which is only read, by transcoders; use mlp.L, resid.L, attn.L, z.L, "
                "resid_mid.L or embed."
            )
    repeated = sorted({site for site in config.sites if config.sites.count(site) > 1})
    if repeated:
        raise UserError(f"Key sites lists {repeated[0]} more than once; name each site once.")
    source = config.model.source
    if isinstance(source, ToySource):
        if source.d_model % (2 * source.heads):
            step = 2 * source.heads
            raise UserError(
                f"Key model.source.d_model is {source.d_model}, which does not give each of {source.heads} heads an "
                f"even width; use a multiple of {step}, for example {max(1, source.d_model // step) * step}."
            )
        deepest = source.layers - 1
        for site in config.sites:
            layer = parse_site(site).layer
            if layer is not None and layer > deepest:
                raise UserError(
                    f"Key sites has {site}, but model {config.model.name} has {source.layers} layers; the deepest is "
                    f"{parse_site(site).kind}.{deepest}."
                )
    for key, value in (
        ("model.architecture", config.model.architecture),
        ("model.source.architecture", getattr(source, "architecture", "auto")),
    ):
        if value != "auto" and value not in ARCHITECTURES:
            raise UserError(f"Key {key} is {value}, which is not supported; {nearest(value, ARCHITECTURES)}.")


def _check_text(config: Config) -> None:
    """Contexts of text are drawn from the corpus, have no patched prompt and no wrong answer."""
    task = config.task
    if not isinstance(task.pairs, TextPairs):
        return
    if any(isinstance(source, TaskSentences) for source in config.corpus.sources):
        raise UserError(
            "Key corpus.sources has kind task, but pairs of kind text come from the corpus, which cannot hold their "
            "sentences; leave that source out."
        )
    if task.metric.kind not in ("logit", "log_probability"):
        lacking = "wrong answer" if task.metric.kind == "logit_difference" else "patched prompt"
        raise UserError(
            f"Key task.metric.kind is {task.metric.kind}, but contexts of kind text have no {lacking}; use logit or "
            "log_probability."
        )
    fixed = {
        "task.metric.position": (task.metric.position, "last"),
        "task.chat_template": (task.chat_template, False),
        "task.generation_prefix": (task.generation_prefix, ""),
    }
    for key, (value, needed) in fixed.items():
        if value != needed:
            raise UserError(
                f"Key {key} is {value!r}, but contexts of kind text are the corpus's tokens as they stand; remove it."
            )


def _check_clusters(config: Config) -> None:
    clusters = config.task.clusters
    if clusters is not None and clusters.site not in config.sites:
        raise UserError(
            f"Key task.clusters.site is {clusters.site}, which is not in sites; {nearest(clusters.site, config.sites)}."
        )


def _check_overrides(config: Config) -> None:
    for site in config.dictionaries.overrides:
        if site not in config.sites:
            raise UserError(
                f"Key dictionaries.overrides.{site} names a site that is not in sites; {nearest(site, config.sites)}."
            )
        try:
            config.dictionary(site)
        except ValidationError as error:
            raise UserError(
                sentence_of(error, ["dictionaries", "overrides", site], config.dictionaries.overrides[site])
            ) from None


def _check_dictionaries(config: Config) -> None:
    for site in config.sites:
        _check_dictionary(config.dictionary(site), site)
        _check_positions(config, config.dictionary(site))


def _check_contenders(config: Config) -> None:
    for number, contender in enumerate(config.comparison.contenders):
        part = config.comparison.model_copy(update={"contenders": [contender]})
        try:
            found = config.model_copy(update={"comparison": part, "study": None}).every_dictionary()
        except ValidationError as error:
            where = ["comparison", "contenders", str(number), "dictionaries"]
            raise UserError(sentence_of(error, where, contender.dictionaries)) from None
        for _, site, settings in found[len(config.sites) :]:
            where_at = f"contender {contender.name} at {site}"
            _check_dictionary(settings, where_at)
            _check_positions(config, settings, f" of {where_at}")


def _check_study(config: Config) -> None:
    study = config.study
    if study is None:
        return
    if study.site not in config.sites:
        raise UserError(
            f"Key study.site is {study.site}, which is not in sites; {nearest(study.site, config.sites)}."
        )
    if study.name == config.dictionaries.name:
        raise UserError(
            f"Key study.name is {study.name}, the name of the dictionaries too; give the study another."
        )
    for number in range(len(study.variants)):
        part = config.model_copy(
            update={"study": study.model_copy(update={"variants": [study.variants[number]]})}
        )
        try:
            variants = part.variants()
        except ValidationError as error:
            raise UserError(
                sentence_of(error, ["study", "variants", str(number)], study.variants[number])
            ) from None
        if not variants:
            raise UserError(
                f"Key study.variants.{number} has an empty list of values; give at least one value."
            )
        for label, settings in variants.items():
            _check_dictionary(settings, f"variant {label}")


def _check_dictionary(settings: DictionarySettings, where: str) -> None:
    if "k" in used_settings(settings.model_dump()) and settings.k > settings.d_dict:
        raise UserError(
            f"Key dictionaries.k is {settings.k} for {where}, more than its d_dict of {settings.d_dict}; lower k or "
            "raise d_dict."
        )
    if settings.kind == "pretrained" and settings.source is None:
        raise UserError(
            f"Key dictionaries.source is missing for {where}: kind pretrained reads a dictionary made elsewhere; give "
            "its format and path, or format, id and revision."
        )
    prefixes = list(settings.prefixes)
    if settings.kind == "matryoshka" and (prefixes != sorted(set(prefixes)) or prefixes[-1:] != [1.0]):
        raise UserError(
            f"Key dictionaries.prefixes is {prefixes} for {where}; give shares of d_dict in ascending order that end "
            "with 1.0."
        )
    check_values(Settings.of(used_settings(settings.model_dump())), "dictionaries.")


def _check_sizes(config: Config) -> None:
    if config.activations.shard_rows % config.corpus.block:
        below = config.activations.shard_rows // config.corpus.block * config.corpus.block
        raise UserError(
            f"Key activations.shard_rows is {config.activations.shard_rows}, not a multiple of corpus.block "
            f"({config.corpus.block}); try {max(below, config.corpus.block)}."
        )


def _check_positions(config: Config, settings: DictionarySettings, where: str = "") -> None:
    check_positions(settings.training.skip_positions, config.corpus.block, "dictionaries.", where)


def _check_stages(config: Config) -> None:
    stages = sorted(script.stem for script in SCRIPTS.glob("*.py"))
    for name in filter(None, config.recompute.split(",")):
        if name not in stages:
            raise UserError(f"Key recompute names {name}, which is not a stage; {nearest(name, stages)}.")


def _check_files(config: Config) -> None:
    for key, name in _paths(config):
        if not Path(name).exists():
            siblings = (
                [entry.name for entry in Path(name).parent.iterdir()] if Path(name).parent.is_dir() else []
            )
            alike = difflib.get_close_matches(Path(name).name, siblings)
            hint = f"; {nearest(Path(name).name, siblings)}" if alike else ""
            raise UserError(f"Key {key} names {name}, which does not exist{hint}.")
    for key, pattern in _patterns(config):
        if not any(file.is_file() for file in Path().glob(pattern)):
            raise UserError(f"Key {key} has the pattern {pattern}, which matches no file.")
    for key, model in config.models().items():
        model_files(model.model_dump(), key)
    for _, site, settings in config.every_dictionary():
        if settings.source is not None:
            local_files(settings.source.model_dump(), site)
    check_transcoder_files(config)


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    """Files and folders that the configuration names, after their keys."""
    if isinstance(config.task.pairs, ImportedPairs):
        yield "task.pairs.train", config.task.pairs.train
        yield "task.pairs.test", config.task.pairs.test
    for key, model in config.models().items():
        if isinstance(model, PathSource):
            yield f"{key}.path", model.path
    sources = [("dictionaries", settings.source) for _, _, settings in config.every_dictionary()]
    sources += [("transcoders", config.transcoders.source)] if config.transcoders else []
    for key, source in sources:
        if source is not None and source.id is None and source.path is not None:
            yield f"{key}.source.path", source.path


def _patterns(config: Config) -> Iterator[tuple[str, str]]:
    """Patterns of text files, after their keys."""
    for text in config.corpus.sources:
        if isinstance(text, TextFiles):
            yield "corpus.sources", text.glob
    tuned_on = config.diffing.tuning.text if config.diffing and config.diffing.tuning else None
    if isinstance(tuned_on, TuningFiles):
        yield "diffing.tuning.text.glob", tuned_on.glob
