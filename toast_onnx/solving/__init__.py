"""New weights in closed form: arrays in, arrays out, no graph in sight (docs/method.md has the mathematics)."""
