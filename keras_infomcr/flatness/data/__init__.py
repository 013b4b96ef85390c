"""The examples that are measured."""
