"""What a model still knows, measured after every update: scores per row, metrics, intervals, gate."""
