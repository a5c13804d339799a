"""One module a subcommand: `plan(recipe)` says what would be done, `run(plan, on_progress)` does it."""
