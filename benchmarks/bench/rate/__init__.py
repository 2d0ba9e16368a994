"""What each way to a wanted rate costs, against the exact logit bias."""
