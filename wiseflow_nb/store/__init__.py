"""The session's file: where it lives, its schema, its one writer, its readers, its commands."""
