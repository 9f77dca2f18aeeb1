"""What every stage stands on: errors, files, manifests, hashes of code, and the records of a run."""
