# What the targets ask for; no rules.


def methods_compared():
    """Everything that the target `methods` asks for."""
    return [
        *of_tasks(f"{SET}/methods/agreement.parquet"),
        *of_tasks(f"{SET}/figures/methods.png"),
    ]


def of_tasks(files):
    """Files of the task and of each of its clusters."""
    return expand(files, task=TASKS)


KEPT = [
    f"{MODEL}/model/manifest.json",
    f"{MODEL}/corpus/manifest.json",
    f"{MODEL}/activations/manifest.json",
    expand(f"{TRAINED}/{{site}}.json", site=SITES),
    of_tasks(f"{TASK}/gradients/train.json"),
    of_tasks(f"{TASK}/gradients/test.json"),
    [f"{BASE}/figures/clusters.{kind}" for kind in ("png", "svg") if CLUSTERS],
    of_tasks(SCORES),
    of_tasks(f"{SET}/ranking/nodes.parquet"),
]
OF_FEATURES = [
    expand(f"{TRAINED}/{{site}}.quality.parquet", site=SITES),
    of_tasks(FEATURES),
    of_tasks(EDGES),
    of_tasks(f"{SET}/circuit.graphml"),
    of_tasks(f"{SET}/faithfulness.parquet"),
    [
        f"{SET}/figures/{plot}.{kind}".replace("{task}", task)
        for task in TASKS
        for plot in PLOTS
        for kind in ("png", "svg")
    ],
    of_tasks(f"{SET}/report.html"),
]
OF_SCORES = [
    f"{SET}/figures/{plot}.{kind}".replace("{task}", task)
    for task in TASKS
    for plot in ("task_accuracy", "agreement")
    for kind in ("png", "svg")
]
