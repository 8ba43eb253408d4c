"""Text from a trained model: recurrent state, sampling, generation."""
