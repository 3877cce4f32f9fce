"""Any method over a data set, and the paper's statistics of what it made."""
