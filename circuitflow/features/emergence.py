"""Which features of a finished dictionary exist when: its decoder rows against those of the checkpoints before it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.dictionaries.geometry import nearest_rows
from circuitflow.features.held_out import HeldOut
from circuitflow.features.statistics import Usage, usage, weight_columns
from circuitflow.jobs import progress
from circuitflow.store.objects import read_manifest

PRESENT = 0.9
"""A feature is there when a decoder row has a larger cosine with its own than this."""

CHECKPOINTS = "checkpoints"

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Moment:
    """A dictionary at one step of its training."""

    dictionary: Dictionary
    used: Usage

    @property
    def when(self) -> dict[str, int]:
        """Steps taken and tokens trained on; 0 where the dictionary does not know."""
        return {name: int(self.dictionary.notes.get(name, 0)) for name in ("step", "tokens")}

    @cached_property
    def weights(self) -> tuple[Columns, float]:
        """Columns about each feature's weights, and the mean |cosine| of decoder rows."""
        return weight_columns(self.dictionary)


def emergence(manifest: Path, final: Moment, held_out: HeldOut) -> tuple[Columns, Columns]:
    """Columns of the tables ``emergence`` and ``checkpoints``, the finished dictionary being the last step."""
    alive = final.used.density > 0
    features: list[Columns] = []
    steps: list[dict[str, float]] = []
    for moment in [*checkpoints(manifest, held_out), final]:
        found = _match(final.dictionary, moment)
        features.append(found)
        steps.append({**moment.when, **_summary(moment, found["match"][alive])})
    return (
        {name: np.concatenate([part[name] for part in features]) for name in features[0]},
        {name: np.array([step[name] for step in steps]) for name in steps[0]},
    )


def checkpoints(manifest: Path, held_out: HeldOut) -> Iterator[Moment]:
    """The dictionary at the checkpoints of its training, earliest first; nothing for one that was not trained here."""
    described = read_manifest(manifest, "dictionary")
    names = sorted(described.details.get("checkpoints", ()), key=lambda name: int(Path(name).stem[5:]))
    for done, name in enumerate(names, 1):
        path = described.folder(manifest) / CHECKPOINTS / name
        dictionary = load_dictionary(path, held_out.rows.width).to(held_out.device)
        yield Moment(dictionary, usage(dictionary, held_out))
        progress("checkpoints", done, len(names))


def _match(final: Dictionary, moment: Moment) -> Columns:
    """For every finished feature the row of that moment whose direction is nearest."""
    nearest = nearest_rows(final.W_dec, moment.dictionary.W_dec)
    matched = nearest.index.cpu().numpy()
    when = {name: np.full(final.d_dict, value, np.int64) for name, value in moment.when.items()}
    return {
        **when,
        "feature": np.arange(final.d_dict),
        "match": nearest.cosine.double().cpu().numpy(),
        "matched": matched,
        "density": np.where(matched >= 0, moment.used.density[matched], np.nan),
    }


def _summary(moment: Moment, match: np.ndarray) -> dict[str, float]:
    """Numbers about one moment.

    :param match: of the finished features that are active on kept tokens.
    """
    weights, mean = moment.weights
    return {
        **moment.used.summary(),
        "present_share": _mean(match > PRESENT),
        "match_mean": _mean(match),
        "nearest_cosine_mean": _mean(weights["nearest_cosine"]),
        "enc_dec_cosine_mean": _mean(weights["enc_dec_cosine"]),
        "encoder_norm_mean": _mean(weights["encoder_norm"]),
        "decoder_cosine_mean": mean,
    }


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are known; NaN if none is."""
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if known.size else float("nan")
