"""The pipeline, one file a stage, one shape; none imports another."""
