"""What a run does on its hosts, at its true size, without its weights: the parts of m1-rehearse."""
