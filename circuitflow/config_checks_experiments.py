"""Mistakes in what a configuration says of experiments on circuits, told before any job starts."""

import re
from pathlib import Path

from circuitflow.config import Config, TextPairs
from circuitflow.config_validation import ComparisonSection
from circuitflow.dictionaries.settings import used_settings
from circuitflow.errors import UserError, nearest
from circuitflow.models.sites import depth_order, parse_site

NODE = re.compile(r"(?P<site>[^/@]+)/(?P<feature>\d+|error)(@\d+)?")
COMPARED = ("values.parquet", "circuit.json")
"""Files of a contender's folder that a comparison reads."""


def check_experiments(config: Config) -> None:
    """Sites, nodes, ranges, ablations, contenders and folders that experiments name.

    :raises UserError: the first mistake.
    """
    _check_sites(config)
    _check_ranges(config)
    _check_ablation(config)
    _check_nodes(config)
    _check_contenders(config)
    _check_others(config)


def _check_sites(config: Config) -> None:
    section = config.error_nodes
    named: list[tuple[str, str | None]] = [("evaluation.starts", site) for site in config.evaluation.starts]
    named += [("error_nodes.start", section.start), ("error_nodes.bound", section.bound)]
    named += [("error_nodes.ranges", site) for ends in section.ranges for site in ends]
    named += [("error_nodes.restore_ranges", site) for ends in section.restore_ranges for site in ends]
    for key, site in named:
        if site is not None and site not in config.sites:
            raise UserError(f"Key {key} names {site}, which is not in sites; {nearest(site, config.sites)}.")


def _check_ranges(config: Config) -> None:
    for name in ("ranges", "restore_ranges"):
        for first, last in getattr(config.error_nodes, name):
            if depth_order(parse_site(first)) > depth_order(parse_site(last)):
                raise UserError(
                    f"Key error_nodes.{name} has [{first}, {last}], whose first site is computed after its last; "
                    f"write [{last}, {first}]."
                )


def _check_ablation(config: Config) -> None:
    """Of further ablations one that the prompts do not allow is left out by the stage, which says so."""
    if isinstance(config.task.pairs, TextPairs) and config.evaluation.ablation == "patched":
        raise UserError(
            "Key evaluation.ablation is patched, but contexts of kind text have no patched prompt; use mean, zero or "
            "resample."
        )


def _check_nodes(config: Config) -> None:
    for key in ("nodes", "curves"):
        for name in getattr(config.effects, key):
            _check_node(config, f"effects.{key}", name)


def _check_node(config: Config, key: str, name: str) -> None:
    found = NODE.fullmatch(name)
    if found is None:
        example = config.sites[0]
        raise UserError(
            f"Key {key} has {name!r}, which is not written as a node; write for example {example}/431 or "
            f"{example}/error."
        )
    site, feature = found["site"], found["feature"]
    if site not in config.sites:
        raise UserError(f"Key {key} names {name}, whose site is not in sites; {nearest(site, config.sites)}.")
    if feature == "error":
        if key == "effects.curves":
            raise UserError(
                f"Key {key} names {name}, a vector that has no value to scale; name features, for example {site}/431."
            )
        return
    settings = config.dictionary(site)
    if "d_dict" in used_settings(settings.model_dump()) and int(feature) >= settings.d_dict:
        raise UserError(
            f"Key {key} names {name}, but the dictionary of {site} has {settings.d_dict} features, 0 to "
            f"{settings.d_dict - 1}."
        )


def _check_contenders(config: Config) -> None:
    """A contender that differs in nothing; those that are listed by default may name the run's own method."""
    if config.comparison.contenders == ComparisonSection().contenders:
        return
    made = {(name, site): settings for name, site, settings in config.every_dictionary()}
    for contender in config.comparison.contenders:
        same = all(
            made.get((f"compare/{contender.name}", site), made[config.dictionaries.name, site])
            == made[config.dictionaries.name, site]
            for site in config.sites
        )
        if same and contender.method in (None, config.scores.method):
            raise UserError(
                f"Key comparison.contenders has {contender.name}, which is the run itself (method "
                f"{config.scores.method}, the same dictionaries); change what differs, or leave it out."
            )


def _check_others(config: Config) -> None:
    for name, folder in config.comparison.others.items():
        missing = [file for file in COMPARED if not (Path(folder) / file).is_file()]
        if missing:
            what = f"has no {missing[0]}" if Path(folder).is_dir() else "does not exist"
            raise UserError(
                f"Key comparison.others.{name} names {folder}, which {what}; name a folder "
                "results/MODEL/TASK/compare/CONTENDER of a run whose target compare is done."
            )
