"""Evaluation of classifiers and of pre-trained features."""
