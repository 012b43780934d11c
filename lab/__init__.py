"""The laboratory: what looks into finished runs, sets them side by side, and draws. Training and sampling work without
it, but for the table that closes a run."""
