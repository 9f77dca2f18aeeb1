"""What a run shows: the verdict, comparisons and figures of its report, its gate, and its model card."""
