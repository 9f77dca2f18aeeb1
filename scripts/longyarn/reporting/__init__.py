"""From figures to the report: the verdict, comparisons, pictures, and the model card."""
