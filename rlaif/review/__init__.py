"""The review queue: pairs that the filter sends to people, and the labels that they give."""
