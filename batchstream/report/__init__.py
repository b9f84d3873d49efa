"""Figures for people and programs: text, Markdown, JSON, the live display."""
