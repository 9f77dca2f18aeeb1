"""The seal of a finished run: checksums, the RO-Crate, their verification, and the archive."""
