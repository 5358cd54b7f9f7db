# Parameters that rules share; no rules.
from circuitflow.provenance import code_digest


def task_style(wildcards):
    """The look of a task's figures, which say what they are of."""
    return STYLE | {"subject": f"{CFG.model.name} · {wildcards.task}"}


def code(rule):
    """Digest of a rule's script and of the library it imports: what makes a code edit re-run the rule."""
    return code_digest(Path(workflow.basedir) / "workflow_scripts" / f"{rule}.py")
