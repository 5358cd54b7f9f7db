"""The configuration's sections on node scores, edges, the choice of a circuit and its evaluation."""

from typing import Literal

from pydantic import Field, model_validator

from circuitflow.config_base import Positive, Section, Seed, Share

Method = Literal["atp", "ig", "relp", "exact", "decoder_only", "sae_in_loop"]


class ScoresSection(Section):
    """Node scores."""

    method: Method = "atp"
    """atp: gradient x change | ig: mean gradient between clean and patched | relp: gradient with the RelP rules |
    exact: nodes truly patched | decoder_only: mean |gradient . decoder row| | sae_in_loop: the traditional way."""
    steps: Positive = 10
    """ig: points between clean and patched."""
    path: Literal["midpoint", "left"] = "midpoint"
    """ig: where the points lie; left only to reproduce other implementations."""
    positions: Literal["sum", "last", "none"] = "sum"
    """sum: a node is all positions together | last: the position of the answer | none: a node per position, for
    prompts of one length."""
    ranking: Literal["absolute", "signed"] = "absolute"
    """absolute: strong nodes have a large |score| | signed: a large score, so that they support the right answer."""
    budget: Positive | None = 64
    """exact: nodes patched per site, the strongest by atp; null patches all that differ."""
    compare: list[Method] = ["atp", "ig", "relp", "exact"]
    """Methods that the target `methods` compares; the last is what the others are held against."""
    batch_pairs: Positive = 32
    """Pairs per forward and backward pass."""
    overlap_at: list[Positive] = [10, 30, 100]
    """k of the overlap@k between train and test rankings."""
    bootstrap: Positive = 1000
    """Resamples of pairs behind every interval of the rankings."""

    @model_validator(mode="after")
    def _different(self) -> "ScoresSection":
        if len(set(self.compare)) < max(2, len(self.compare)):
            raise ValueError("compare needs at least two methods, each once")
        return self


class EdgesSection(Section):
    """Edges between neighbouring sites."""

    pool: Positive = 48
    """Nodes per site, by strength, between which edges are computed. A circuit takes its nodes from this pool."""
    batch_pairs: Positive = 4
    """Pairs per pass: in a small batch fewer downstream nodes are active and need a product."""
    memory_mb: Positive = 500
    """Memory of one batched product; decides how many downstream nodes go together."""
    exact: int = Field(default=0, ge=0)
    """Upstream nodes per site whose edges are measured exactly as well, by patching them and running the blocks."""
    draws: Positive = 50
    """Bootstrap draws of pairs behind the stability of edges."""


RULES = ("top", "threshold", "percentile", "sparsity", "zscore", "effect_share")


class Selection(Section):
    """Which nodes or edges are kept, on their strength; exactly one rule."""

    top: Positive | None = None
    """The n strongest."""
    threshold: float | None = Field(default=None, ge=0)
    """All above this value."""
    percentile: float | None = Field(default=None, ge=0, lt=100)
    """All that reach this percentile of the candidates."""
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    """All but this share of all nodes of the run's sites, inactive ones included."""
    zscore: float | None = None
    """All stronger than the candidates' mean by this many standard deviations."""
    effect_share: float | None = Field(default=None, gt=0, le=1)
    """The fewest that have this share of the summed strength."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "Selection":
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            names = list(type(self).model_fields)
            raise ValueError(f"exactly one of {', '.join(names[:-1])} and {names[-1]} is needed")
        return self


class NodeSelection(Selection):
    """Which nodes are kept; a wanted faithfulness is searched for."""

    faithfulness: float | None = Field(default=None, gt=0)
    """The fewest strongest whose circuit reaches this faithfulness on training pairs."""


class CircuitSection(Section):
    """Which nodes and edges make the circuit."""

    nodes: NodeSelection = NodeSelection(top=60)
    """Nodes over all sites, error nodes included."""
    edges: Selection = Selection(top=150)
    """Edges among those nodes."""
    prune: Literal["none", "source_to_sink", "sink_backwards"] = "none"
    """Drop nodes without a path of edges to the metric (sink_backwards), or from a source too (source_to_sink)."""
    max_nodes: Positive | None = None
    """At most this many nodes, the strongest."""
    stability: Positive = 200
    """Resamples of pairs behind the stability of nodes."""


Ablation = Literal["mean", "zero", "patched", "resample"]
Errors = Literal["kept", "removed", "resid_removed", "other_removed"]


class EdgeAblationSection(Section):
    """Edges ablated within the circuit, in units of edges; what is not named here is as for nodes."""

    counts: list[Positive] = [10, 20, 50, 100, 200, 500, 1000, 2000]
    """Edge counts of the curve; the circuit's own edges and all edges between its nodes are always added."""
    random_counts: list[Positive] = [50, 200]
    """Edge counts at which random edges are drawn."""
    random_draws: int = Field(default=20, ge=0)
    """Draws per count, as many edges between each pair of sites. Every draw costs about a pass per node."""
    pairs: Positive = 20
    """Test pairs used, spread evenly over the cases."""


class ConfidenceCounts(Section):
    """Thresholds at which the confident prompts are counted."""

    differences: list[float] = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0]
    """Least logit(right) - logit(wrong)."""
    probabilities: list[Share] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5]
    """Least probability of the right answer."""
    ranks: list[Positive] = [1, 3, 10, 30, 100, 300, 1000]
    """Greatest rank of the right answer."""


class EvaluationSection(Section):
    """Faithfulness."""

    counts: list[Positive] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
    """Node counts of the curve; the circuit itself and all nodes are always added."""
    thresholds: list[Share] = []
    """Further circuits of the curve: nodes with |score| above these shares of the largest."""
    shares: list[Share] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    """Parts of all nodes kept, over which the areas CPR and CMD are taken."""
    random_counts: list[Positive] = [10, 50, 200, 1000]
    """Node counts at which random circuits are drawn."""
    random_draws: int = Field(default=20, ge=0)
    """Random circuits per count, matched per site and kind."""
    pairs: Positive = 40
    """Test pairs used, spread evenly over the cases."""
    ablation: Ablation = "mean"
    """What nodes outside the circuit become: mean: over patched training inputs per case and position | zero |
    patched: their value in the prompt's patched run | resample: in that of another training prompt of the case."""
    means: Literal["train", "test"] = "train"
    """The split over whose patched inputs the means are taken."""
    further_ablations: list[Ablation] = ["zero", "patched", "resample"]
    """Ablations under which the curve is measured again; one that the prompts do not allow is left out."""
    starts: list[str] = []
    """Further sites at which ablation starts; sites before it are left free, in the empty circuit too."""
    errors: list[Errors] = ["kept", "removed", "resid_removed", "other_removed"]
    """Further treatments of error nodes: all kept, none, none of the residual stream, none of other sites."""
    neurons: bool = True
    """Evaluate circuits of neurons too: the coordinates of the same sites."""
    aggregate: Literal["ratio_of_means", "mean_of_ratios"] = "ratio_of_means"
    """How prompts are averaged in figures and on the page; tables hold both."""
    edges: EdgeAblationSection = EdgeAblationSection()
    """Edges ablated within the circuit."""
    confidence: ConfidenceCounts = ConfidenceCounts()
    """Counts of prompts by confidence."""
    bootstrap: Positive = 1000
    """Resamples of the intervals."""
    seed: Seed = 0
    """Seed of draws and resamples."""
    batch_rows: Positive = 512
    """Prompt copies per forward pass."""
