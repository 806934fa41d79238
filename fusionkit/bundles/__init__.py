"""Parts on disk: the format, written, resumed, read, exported."""
