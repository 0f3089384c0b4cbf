"""Reports: results of evaluations, races, training runs and checks as one page that needs no network."""

from .page import PAGE, Report, make_report, render, write_report
from .sources import KINDS, Source, read_sources

__all__ = ["KINDS", "PAGE", "Report", "Source", "make_report", "read_sources", "render", "write_report"]
