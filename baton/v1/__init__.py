"""Generated from proto/baton/v1; committed, never edited."""
