"""The configuration's sections on the audit of circuits, contenders at equal budgets, and effects on single prompts."""

from typing import Any, Literal

from pydantic import Field, model_validator

from circuitflow.config_base import Name, Positive, Section, Seed, Share


class AuditSection(Section):
    """How much of the truth a circuit is held against: nodes and edges in and out of it, truly patched."""

    nodes: Positive = 240
    """Features patched; the errors of all sites besides."""
    edges: Positive = 120
    """Edges measured, by patching the upstream node and running the blocks between again."""
    inside: Share = 0.25
    """Share of both that is spent on the circuit's own."""
    middle: Share = 0.95
    """Share of the summed |score| that the strata top and middle hold; the rest is sampled more thinly."""
    pairs: Positive = 16
    """Test pairs used, spread evenly over the cases."""
    bootstrap: Positive = 1000
    """Resamples of pairs behind the interval of every effect."""
    seed: Seed = 0
    """Seed of the sample and of the resamples."""


class Contender(Section):
    """What differs from the run: the node method, the dictionaries, or both."""

    name: Name
    """In tables and figures; also the folder of its dictionaries, if it has its own."""
    method: Literal["atp", "ig", "relp"] | None = None
    """Node method; null: the run's (atp for other dictionaries, where the run's scores its own alone)."""
    dictionaries: dict[str, Any] = {}
    """Keys of dictionaries that differ, e.g. {kind: identity} for neurons, {seed: 1} or {kind: jumprelu}."""


class ComparisonSection(Section):
    """Contenders at equal node budgets (target `compare`); the run itself is the first."""

    contenders: list[Contender] = [
        Contender(name="neurons", dictionaries={"kind": "identity"}),
        Contender(name="ig", method="ig"),
        Contender(name="relp", method="relp"),
    ]
    """What the run is compared with."""
    counts: list[Positive] = [5, 10, 20, 50, 100, 200, 500, 1000, 2000]
    """Node counts, the same for all."""
    shares: list[Share] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    """Parts of each contender's own nodes, for the areas CPR and CMD."""
    size: Positive = 60
    """Nodes of the circuits whose overlap is reported."""
    least_cosine: float = Field(default=0.7, gt=0, le=1)
    """Features of different dictionaries are the same from this cosine of their decoder rows on."""
    others: dict[Name, str] = {}
    """Further contenders by name: folders results/{model}/{task}/compare/{contender} of other runs (tasks, seeds) with
    values.parquet and circuit.json; prompts that differ are not paired."""

    @model_validator(mode="after")
    def _different(self) -> "ComparisonSection":
        names = [one.name for one in self.contenders] + list(self.others)
        if len(set(names)) < len(names) or "run" in names:
            raise ValueError("contenders need different names, none of them 'run', which is the run itself")
        same = [one.name for one in self.contenders if one.method is None and not one.dictionaries]
        if same:
            raise ValueError(
                f"contender {same[0]} does not differ from the run; give it a method or dictionaries"
            )
        return self

    def sets(self) -> dict[str, dict[str, Any]]:
        """By name, the keys of every further set of dictionaries that is to be made."""
        return {one.name: one.dictionaries for one in self.contenders if one.dictionaries}


class EffectsSection(Section):
    """What the circuit does on single prompts (target `effects`)."""

    nodes: list[str] = []
    """Nodes that are ablated together and one by one, as resid.12/431 or resid.12/error; the circuit is in any case."""
    curves: list[str] = []
    """Features whose response is measured; empty: the circuit's strongest."""
    top: Positive = 3
    """How many of these."""
    multiples: list[float] = [-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
    """What a feature is held at, as multiples of its own value at each token where it fires in the prompt."""
    values: list[float] = []
    """The same as plain activations, at those tokens."""
    pairs: Positive = 24
    """Test prompts, spread evenly over the cases."""
    tokens: Positive = 5
    """Likeliest tokens listed per intervention, beside the answers."""

    @model_validator(mode="after")
    def _something_held(self) -> "EffectsSection":
        if not self.multiples and not self.values:
            raise ValueError(
                "multiples and values are both empty, so a curve has no point; name at least one"
            )
        return self
