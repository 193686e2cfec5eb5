"""The report of a run: its stages, plots, sections and page."""
