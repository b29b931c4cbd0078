"""Interaction logs to jagged batches: preparation, reading order, loading, and the `Batch` that the model sees."""
