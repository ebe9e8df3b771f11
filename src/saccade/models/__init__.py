"""Small real models to run on, texts and tasks."""
