"""Words, phrases and scripts at wanted rates: a teacher that looks ahead, and the adapter that learns it."""
