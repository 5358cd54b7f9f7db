"""Put figures, tables and provenance into one HTML page."""

from circuitflow.jobs import run_light
from circuitflow.report.page import build_report

if "snakemake" in globals():
    run_light(snakemake, build_report)
