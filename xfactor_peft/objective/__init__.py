"""What is wanted, in nats: targets, goals, the tilt, and the KL losses."""
