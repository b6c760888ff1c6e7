"""What a run's step takes on devices that need not be here."""
