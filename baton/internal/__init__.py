"""Generated from proto/baton/internal; committed, never edited, not public."""
