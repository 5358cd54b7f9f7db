# Parameters that rules share; no rules.
from circuitflow.code_digests import CodeReader

CODE = CodeReader(memory=Path(".snakemake/circuitflow/code.json"))


def task_style(wildcards):
    """The look of a task's figures, which say what they are of."""
    return STYLE | {"subject": f"{CFG.model.name} · {wildcards.task}"}


def code(rule):
    """Digest of a rule's script and of the library it imports: what makes a code edit re-run the rule."""
    return CODE.digest(Path(workflow.basedir) / "workflow_scripts" / f"{rule}.py")
