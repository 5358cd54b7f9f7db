# Where the tables of contenders at equal node budgets are; no rules.

RUN = "run"
CONTENDERS = {RUN: (CFG.dictionaries.name, METHOD)} | {
    one.name: (
        f"compare/{one.name}" if one.dictionaries else CFG.dictionaries.name,
        one.method
        # Other dictionaries are scored from gradients.
        or (METHOD if not one.dictionaries or METHOD in ("ig", "relp") else "atp"),
    )
    for one in CFG.comparison.contenders
}
# Sets of dictionaries that only the comparison has.
COMPARED_SETS = [
    name for name, _ in CONTENDERS.values() if name != CFG.dictionaries.name
]
COMPARE = f"{TASK}/compare"
OF_COMPARISON = [f"{COMPARE}/comparison.parquet", f"{COMPARE}/figures/budgets.png"]
BUDGET_TABLES = ["comparison", "differences", "areas", "circuits"]


def contender_scores(ending):
    """Score tables of a contender, in the order of the sites."""

    def tables(wildcards):
        name, method = CONTENDERS[wildcards.contender]
        folder = f"{MODEL}/{wildcards.task}/{name}/scores/{method}"
        return [f"{folder}/{site}{ending}.parquet" for site in SITES]

    return tables


def contender_dictionaries(wildcards):
    """Its dictionaries, in the order of the sites."""
    name, _ = CONTENDERS[wildcards.contender]
    return [f"{DICTIONARIES}/{name}/{site}.json" for site in SITES]


def other_contenders(file):
    """The same file of every contender, those of other runs last."""
    return [f"{COMPARE}/{name}/{file}" for name in CONTENDERS] + [
        f"{folder}/{file}" for folder in CFG.comparison.others.values()
    ]
