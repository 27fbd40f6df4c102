"""The parts of a step of Muon: the orthogonal factor of a matrix, and what is around it."""
