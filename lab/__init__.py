"""The laboratory: it measures and draws what training alone does not need."""
