"""How parameters and optimizer state are spread over ranks; knows no model, data or schedule."""
