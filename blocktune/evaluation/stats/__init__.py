"""From the rows of a run to scores, intervals, comparisons and the sentences about them."""
