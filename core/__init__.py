"""What the commands share: settings, run folders, where a run computes, attention and its cache, and reports."""
