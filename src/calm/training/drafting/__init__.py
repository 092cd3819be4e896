"""Training of drafters: the features of the target are computed once, the drafters are trained on them."""
