# Ways around what Snakemake itself does, after all rules; no rules.
from circuitflow.provenance import canonical_json, digest


def named_values(params):
    """A parameter that changes whenever one of a rule's others does: a digest of names and values."""

    def value(wildcards):
        found = {
            name: given(wildcards) if callable(given) else given
            for name, given in params.items()
        }
        return digest(canonical_json(found))

    return value


def look_only_when_jobs_end():
    """Take away the standard limit of 100 jobs a second.

    Under it Snakemake looks at every input anew each second, once more for each job that has ended (its issue 2967):
    minutes of a core in a run of 200 jobs. A limit that the user set stays.
    """
    limit = workflow.scheduling_settings.max_jobs_per_timespan
    if limit and (limit.max_jobs, limit.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None


# Snakemake compares the parameters' values without their names, and so would miss
# some edits: an 8 that becomes a 4 where another parameter was 8 and a third is 4.
for each in workflow.rules:
    if each.params:
        each.set_params(named=named_values(dict(each.params.items())))
