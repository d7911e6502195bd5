"""Pages that show what a model predicts and how well."""
