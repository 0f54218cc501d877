"""Works out the loss of a batch, term by term, as sums over planned counts."""
