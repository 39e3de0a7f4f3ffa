"""What the answers show: accuracies with intervals, letters, differences, verdicts."""
