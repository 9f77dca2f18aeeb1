"""The seal of a finished run: checksums, the RO-Crate, and their verification."""
