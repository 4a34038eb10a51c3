"""What a trained model can do: in-context and in-weights scores, language-model metrics."""
