"""Is it better? Tasks, statistics and the measures of each stage."""
