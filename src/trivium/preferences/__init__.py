"""Human and AI judgements, in a database; no torch."""
