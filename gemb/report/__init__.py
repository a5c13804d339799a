"""What a job says: its plan, its report, its progress, and how people and programs see them."""

from gemb.report.progress import Event, OnProgress, ignore, progress
from gemb.report.result import Plan, Report, Table, counted, show

__all__ = ["Event", "OnProgress", "Plan", "Report", "Table", "counted", "ignore", "progress", "show"]
