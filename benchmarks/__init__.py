"""Scripts, each run by its path; they import each other as `benchmarks.NAME`."""
