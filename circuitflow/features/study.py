"""The stage ``study_features``: what the features of one dictionary are, when they came to be, and what they do."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.dictionaries.quality import check_one_site
from circuitflow.dictionaries.rows import open_rows
from circuitflow.errors import UserError
from circuitflow.features.emergence import Moment, emergence
from circuitflow.features.held_out import HeldOut, Words, encode_kept
from circuitflow.features.maps import LARGEST_MAP, activation_map, direction_map, map_clusters
from circuitflow.features.statistics import NOISE, Usage, strength, usage
from circuitflow.features.together import correlation_columns, heatmap_columns, together
from circuitflow.jobs import Output
from circuitflow.models.prepared import load_tokenizer
from circuitflow.store.arrays import open_store
from circuitflow.store.tables import write_table

SAMPLE = 1000  # tokens of the projection

Columns = dict[str, np.ndarray]


def study_features(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Study one dictionary on held-out tokens that its outlier rule keeps ("kept tokens").

    Inputs ``dictionary``, ``activations``, ``corpus`` and ``model`` (manifests; of the model only the tokenizer);
    params ``site``, ``settings`` (of the variant, :func:`~circuitflow.dictionaries.settings.used_settings`: recorded in
    the provenance of every table, ``read_provenance(path)["params"]["settings"]``), ``features`` (how many, by
    importance, go into correlation and heat map), ``seed`` and ``compute``. Outputs, all Parquet:

    ``features``, one row per feature, in order: feature; density (share of kept tokens at which it is active);
    density_q1 … density_q4 (the same in four consecutive quarters of the held-out blocks, NaN for a quarter without
    tokens); mean_active (mean |value| where active, NaN if never); max_value (largest |value|); b_enc; encoder_norm;
    decoder_norm; enc_dec_cosine (cosine of encoder and decoder row); nearest (the feature whose decoder row has the
    largest cosine with its own, −1 if there is none) and nearest_cosine; importance (see
    :mod:`~circuitflow.features.statistics`: share of variance lost when it alone is removed); sensitivity (relative
    change of its activity under noise, NaN if never active); map_x, map_y (UMAP of decoder directions, NaN for features
    that are never active, or left out of a map that is too large); cluster (HDBSCAN of the map, −1 none); rank (by
    falling importance, from 1).

    ``emergence``, one row per (step, feature) for every checkpoint and the end of training, steps ascending: step;
    tokens; feature (of the finished dictionary); match (largest cosine of its decoder row with any decoder row at that
    step); matched (that row); density (of the matched row at that step, on kept tokens).

    ``checkpoints``, one row per step, ascending, the last one the finished dictionary: step; tokens (trained on by
    then); fvu; l0; silent_share; high_frequency_share (density above 0.1); density_p25, density_p50, density_p75
    (quartiles over features that are active at all); stability (correlation of log density between the first and the
    second half of the held-out blocks, over features active in both); present_share (of finished features active on
    kept tokens: match above 0.9); match_mean (over the same features); nearest_cosine_mean; enc_dec_cosine_mean;
    encoder_norm_mean; decoder_cosine_mean (mean |cosine| over all pairs of decoder rows).

    ``correlation``, one row per ordered pair of the top features, in order of rank, the diagonal included: feature_a,
    feature_b, correlation (Pearson, of values over kept tokens, zeros included; NaN for a feature that is constant).

    ``heatmap``, one row per (top feature, token) of one stretch of held-out text: feature (in order of rank); block;
    position (in its block); token (its text, as ``token_text`` gives it); value (0 where inactive).

    ``projection``, one row per sampled kept token: block; position; token; x, y (first two principal components of
    activations); cluster (k-means); top_feature (largest |value| × decoder norm, −1 if none is active).

    Every provenance has ``facts``: of ``features``: n (kept tokens), quarter_tokens, clusters, mapped (features on the
    map), noise, stability (as in ``checkpoints``; null if unknown); of ``projection``: explained (shares of variance of
    the two components), components (that k-means sees), clusters, cluster_sizes, inertia_share, silhouette.

    A dictionary that was not trained here has no checkpoints: its tables have the last step alone (step 0 if unknown).

    :raises UserError: the dictionary has no encoder, writes another site than it reads, or is of another width.
    """
    rows = open_rows(inputs["activations"], params["site"])
    device = torch.device(params["compute"]["device"])
    dictionary = _load(inputs, rows.width).to(device)
    held_out = HeldOut(rows, dictionary.skip, device)
    words = Words(open_store(inputs["corpus"]), load_tokenizer(inputs["model"]))
    moment, seed = Moment(dictionary, usage(dictionary, held_out)), params["seed"]
    used = moment.used

    features = {**_usage_columns(used), **_strength_columns(moment, held_out, seed)}
    places, mapped = _map(dictionary, features["density"], seed)
    clusters = map_clusters(places)
    features |= {"map_x": places[:, 0], "map_y": places[:, 1], "cluster": clusters, "rank": _rank(features)}
    over_time, steps = emergence(inputs["dictionary"], moment, held_out)
    order = np.argsort(features["rank"], kind="stable")
    top = order[features["density"][order] > 0][: params["features"]]
    found = together(dictionary, held_out, top)
    projection, facts = _projection(dictionary, held_out, words, seed)

    written = {
        "features": (
            features,
            {
                "n": int(used.tokens.sum()),
                "quarter_tokens": used.tokens.tolist(),
                "clusters": int(clusters.max(initial=-1)) + 1,
                "mapped": mapped,
                "noise": NOISE,
                "stability": None if np.isnan(used.stability) else used.stability,
            },
        ),
        "emergence": (over_time, {}),
        "checkpoints": (steps, {}),
        "correlation": (correlation_columns(found, top), {}),
        "heatmap": (heatmap_columns(found, top, words), {}),
        "projection": (projection, facts),
    }
    for name, (columns, told) in written.items():
        write_table(out.files[name], columns, {**out.provenance, "facts": told})


def _load(inputs: Mapping[str, Any], width: int) -> Dictionary:
    dictionary = load_dictionary(inputs["dictionary"], width=width)
    check_one_site(dictionary)
    if dictionary.W_enc is None:
        raise UserError(
            f"Dictionary {inputs['dictionary']} has a decoder only, so that nothing tells when its features are "
            "active; leave it out of study.variants."
        )
    return dictionary


def _usage_columns(used: Usage) -> Columns:
    quarters = {f"density_q{number}": share for number, share in enumerate(used.density_by_quarter, 1)}
    return {"feature": np.arange(used.d_dict), "density": used.density, **quarters}


def _strength_columns(moment: Moment, held_out: HeldOut, seed: int) -> Columns:
    columns = strength(moment.dictionary, held_out, seed).columns(moment.used.sums.variance)
    weights, _ = moment.weights
    return {
        "mean_active": columns.pop("mean_active"),
        "max_value": columns.pop("max_value"),
        **weights,
        **columns,
    }


def _map(dictionary: Dictionary, density: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
    """Places of all features on the map, and how many have one: the most often active, if there are too many."""
    alive = np.flatnonzero(density > 0)
    chosen = np.sort(alive[np.argsort(-density[alive], kind="stable")[:LARGEST_MAP]])
    places = np.full((dictionary.d_dict, 2), np.nan)
    places[chosen] = direction_map(
        dictionary.W_dec[torch.from_numpy(chosen).to(dictionary.W_dec.device)], seed
    )
    return places, int((~np.isnan(places[:, 0])).sum())


def _rank(features: Columns) -> np.ndarray:
    """Place of each feature by falling importance, from 1; features that are never active come last."""
    rank = np.empty(len(features["feature"]), np.int64)
    order = np.lexsort((-features["importance"], features["density"] == 0))
    rank[order] = np.arange(1, len(order) + 1)
    return rank


def _projection(
    dictionary: Dictionary, held_out: HeldOut, words: Words, seed: int
) -> tuple[Columns, dict[str, Any]]:
    """Sampled kept tokens in their principal plane; the sample is spread evenly over the held-out text."""
    sample = held_out.rows.spread(held_out.kept, SAMPLE)
    index, vectors, top = [], [], []
    for rows, x in held_out.chunks(sample):
        index.append(rows)
        vectors.append(x.cpu().numpy())
        top.append(_top_features(dictionary, x))
    row, size = np.concatenate(index), held_out.rows.block
    mapped = activation_map(np.concatenate(vectors), seed)
    texts = [
        text
        for block in np.unique(row // size)
        for text in words.at(int(block), row[row // size == block] % size)
    ]
    columns = {
        "block": row // size,
        "position": row % size,
        "token": np.array(texts, dtype=object),
        "x": mapped.places[:, 0],
        "y": mapped.places[:, 1],
        "cluster": mapped.cluster,
        "top_feature": np.concatenate(top),
    }
    return columns, mapped.facts


def _top_features(dictionary: Dictionary, x: torch.Tensor) -> np.ndarray:
    """The feature with the largest |value| × decoder norm at each token; −1 where none is active."""
    codes = encode_kept(dictionary, x)
    size = (codes.values.abs() * dictionary.W_dec.norm(dim=1)[codes.features]).cpu().numpy()
    rows, features = codes.rows().cpu().numpy(), codes.features.cpu().numpy()
    top = np.full(codes.n, -1, np.int64)
    rising = np.lexsort((-features, size, rows))  # the last entry of a row has its largest value
    top[rows[rising]] = features[rising]
    return top
