"""Scoring of many pictures: batches, engines, the journal that a killed run goes on from, files and pages of scores."""
